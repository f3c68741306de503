"""ESM's heads against a computation by hand, their losses, and how they save and load."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    EsmConfig,
    PreTrainedModel,
)

from raptr_ds.finetuning.heads import EsmForMultipleChoice, EsmForQuestionAnswering

CONFIG = EsmConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
    position_embedding_type="rotary",
    pad_token_id=0,
    mask_token_id=1,
    token_dropout=False,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(0))


def test_multiple_choice_by_hand() -> None:
    """Each choice alone, without padding, gives the score that it has in a padded batch."""
    torch.manual_seed(0)
    model = EsmForMultipleChoice(CONFIG).double().eval()
    ids = tokens(2, 3, 7)
    mask = torch.ones_like(ids)
    mask[1, 2, 5:] = 0
    found = model(ids, mask, labels=torch.tensor([2, 0]))
    for row in range(2):
        for choice in range(3):
            alone = ids[row, choice][mask[row, choice].bool()]
            hidden = model.esm(alone[None], attention_mask=torch.ones(1, len(alone))).last_hidden_state[0, 0]
            dense = model.esm.pooler.dense
            score = (
                torch.tanh(hidden @ dense.weight.T + dense.bias) @ model.classifier.weight[0] + model.classifier.bias
            )
            assert found.logits[row, choice].item() == pytest.approx(score.item(), abs=1e-12)  # fp64
    chances = found.logits.softmax(-1)
    assert found.loss.item() == pytest.approx(-(chances[0, 2].log() + chances[1, 0].log()).item() / 2, abs=1e-12)


def test_question_answering_by_hand() -> None:
    torch.manual_seed(0)
    model = EsmForQuestionAnswering(CONFIG).double().eval()
    ids = tokens(2, 7)
    starts, ends = torch.tensor([1, 0]), torch.tensor([4, 0])
    found = model(ids, torch.ones_like(ids), starts, ends)
    hidden = model.esm(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    weight, bias = model.qa_outputs.weight, model.qa_outputs.bias
    for logits, number in ((found.start_logits, 0), (found.end_logits, 1)):
        assert torch.allclose(logits, hidden @ weight[number] + bias[number], atol=1e-12, rtol=0)  # fp64
    parts = [
        -logits.log_softmax(-1)[row, places[row]]
        for logits, places in ((found.start_logits, starts), (found.end_logits, ends))
        for row in range(2)
    ]
    assert found.loss.item() == pytest.approx(sum(part.item() for part in parts) / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "auto", "shape"),
    [
        (EsmForMultipleChoice, AutoModelForMultipleChoice, (1, 2, 5)),
        (EsmForQuestionAnswering, AutoModelForQuestionAnswering, (1, 5)),
    ],
)
def test_they_save_and_load_as_any_model(
    tmp_path: Path, kind: type[PreTrainedModel], auto: type, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = kind(CONFIG).eval()
    model.save_pretrained(tmp_path)
    for loader in (kind, auto):
        again = loader.from_pretrained(tmp_path).eval()
        assert type(again) is kind
        for (name, before), (_, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(before, after), name
        # To rounding: where weights lie in memory decides how some CPUs sum.
        before, after = (one(tokens(*shape))[0] for one in (model, again))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
