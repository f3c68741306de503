"""Multiple choice and question answering on ESM, for which transformers has no classes.

They are what transformers' own classes are for MegatronBert, with its names: `classifier` on a tanh layer over the
first token, and `qa_outputs` over every token. They save and load as any model of transformers does; importing this
file makes the two Auto classes know them.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMultipleChoice, AutoModelForQuestionAnswering, EsmConfig, EsmModel
from transformers.modeling_outputs import MultipleChoiceModelOutput, QuestionAnsweringModelOutput
from transformers.models.esm.modeling_esm import EsmPreTrainedModel


class EsmForMultipleChoice(EsmPreTrainedModel):
    """One score for each choice, from the first token of the text with that choice."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.esm = EsmModel(config)  # with its tanh layer
        self.dropout = nn.Dropout(config.hidden_dropout_prob or 0.0)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> MultipleChoiceModelOutput:
        """Return scores, and with labels the mean cross-entropy.

        Shapes: input_ids and attention_mask (batch, choices, tokens); labels (batch,); logits (batch, choices).
        """
        batch, choices, _ = input_ids.shape
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        pooled = self.esm(input_ids.flatten(0, 1), attention_mask=mask).pooler_output
        logits = self.classifier(self.dropout(pooled)).view(batch, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


class EsmForQuestionAnswering(EsmPreTrainedModel):
    """Two logits for each token: that the answer begins there, and that it ends there."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.esm = EsmModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Return logits, and with positions the mean of the two cross-entropies.

        Shapes: input_ids, attention_mask and both logits (batch, tokens); positions (batch,).
        """
        outputs = self.qa_outputs(self.esm(input_ids, attention_mask=attention_mask).last_hidden_state)
        start, end = outputs.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (cross_entropy(start, start_positions) + cross_entropy(end, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)  # type: ignore[arg-type]


for _auto, _kind in (
    (AutoModelForMultipleChoice, EsmForMultipleChoice),
    (AutoModelForQuestionAnswering, EsmForQuestionAnswering),
):
    _auto.register(EsmConfig, _kind, exist_ok=True)  # without it transformers ignores classes for its own settings
