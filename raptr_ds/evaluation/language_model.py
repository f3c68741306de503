"""Our prefix language model for lm-evaluation-harness: contexts are its prefix, seen in both directions."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from raptr_ds.errors import ConfigError
from raptr_ds.evaluation.gold_bits import GoldInstance
from raptr_ds.evaluation.likelihoods import Likelihood, likelihoods, moved_spaces
from raptr_ds.evaluation.ranks import ALONE, Ranks
from raptr_ds.evaluation.shared_rows import Scored, lay_out
from raptr_ds.hf.generation import GREEDY, Continuation, Prompt, Sampling, generate
from raptr_ds.hf.load import PrefixModel, load_prefix_model
from raptr_ds.hf.text import mode_ids

_MAX_NEW_TOKENS = 256  # the harness's default, for tasks that name no number
_Progress = Callable[[str, int, int], None]


class PrefixLM(TemplateLM):
    """Scores and continues texts behind a mode token: [mode] context | continuation.

    Requests are distributed over ranks in here, which the harness allows: the prompts are then those of one process,
    few-shot examples included, and what shares a context stays together.
    """

    def __init__(
        self,
        pretrained: PrefixModel | str,
        mode: str | None = "S2S",
        causal: bool = False,
        batch_size: int | str | None = None,
        device: str | None = None,
        ranks: Ranks = ALONE,
        on_progress: _Progress = lambda what, done, total: None,
        **unused: Any,
    ) -> None:
        """pretrained: a model, or its folder. mode: NLU, NLG, S2S, or None for no mode token.

        causal: contexts are seen left to right. batch_size: rows at once, 16 by default.

        Raises: ConfigError for a mode that the tokenizer lacks, or a batch size that is no number; as load_prefix_model
        does.
        """
        super().__init__()
        if batch_size is not None and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise ConfigError(f"batch_size={batch_size}: give a number of rows at once, at least 1.")
        is_loaded = isinstance(pretrained, PrefixModel)
        self.loaded = pretrained if is_loaded else load_prefix_model(Path(pretrained), device=device)
        self.tokenizer: Any = self.loaded.tokenizer
        self.causal, self.ranks, self._on_progress = causal, ranks, on_progress
        self.num_rows = int(batch_size or 16)
        self.max_length: int = self.loaded.model.config.max_position_embeddings
        self.truncated: set[Any] = set()  # numbers of the documents whose context lost its beginning
        known = mode_ids(self.tokenizer)
        if mode is not None and f"[{mode}]" not in known:
            raise ConfigError(
                f"the model's tokenizer has no mode [{mode}]; it has {', '.join(known) or 'none'}. Choose one of them, "
                "or no mode."
            )
        self._mode = [] if mode is None else [known[f"[{mode}]"]]
        self._device = self.loaded.model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the mode, else the token that begins or ends a text."""
        if self._mode:
            return self._mode[0]
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return (log-likelihood, is greedy) of each request's continuation behind its context.

        None for a gold answer that is longer than the model takes. Raises: ConfigError for other continuations.
        """
        pairs = [moved_spaces(*request.args[:2]) for request in requests]
        ids = self._encode_each(text for context, continuation in pairs for text in (context, context + continuation))
        sequences: dict[int, Scored] = {}
        for number, (request, (context, continuation)) in enumerate(zip(requests, pairs, strict=True)):
            before, whole = ids[context], ids[context + continuation]
            # Where the first token of the continuation took in the context's last one, it is encoded alone.
            after = whole[len(before) :] or self.tok_encode(continuation)
            if not isinstance(request, GoldInstance) or self._fits(after):
                sequences[number] = self._sequence(before, after, request)
        answers = dict(zip(sequences, self._score(list(sequences.values())), strict=True))
        for number, answer in answers.items():
            self.cache_hook.add_partial("loglikelihood", requests[number].args, answer)
        return [answers.get(number) for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the same for contexts and continuations that are tokens."""
        return self._score([self._sequence(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the longest sequence, each behind the mode."""
        ids = self._encode_each(request.args[0] for request in requests)
        sequences, owners = [], []
        for number, request in enumerate(requests):
            room = self.max_length - len(self._mode)
            for window in get_rolling_token_windows(ids[request.args[0]], self.prefix_token_id, room, context_len=1):
                context, continuation = make_disjoint_window(window)
                if self._mode and context == self._mode:  # the first window, whose context is the mode alone
                    context = []
                sequences.append(self._sequence(context, continuation, request))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (log, _) in zip(owners, self._score(sequences), strict=True):
            sums[number] += log
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return each context's continuation up to the first of its stop sequences, which is left out."""
        contexts, choices = zip(*(request.args for request in requests), strict=True)
        ids = self._encode_each(contexts)
        jobs: dict[tuple[Any, ...], list[int]] = {}  # requests with the same options, which may share a batch
        for number in range(len(requests)):
            key = sorted((name, str(value)) for name, value in choices[number].items())
            jobs.setdefault(tuple(key), []).append(number)
        texts: dict[int, str] = {}
        for numbers in jobs.values():
            options = normalize_gen_kwargs(choices[numbers[0]], _MAX_NEW_TOKENS)
            prompts = {number: self._prompt(ids[contexts[number]], options, requests[number]) for number in numbers}
            texts |= self._continue(prompts, options)
        return [texts[number] for number in range(len(requests))]

    def _encode_each(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Return the ids of each different text, from one call of the tokenizer, which works in parallel."""
        different = [text for text in dict.fromkeys(texts) if text]
        if not different:
            return {"": []}
        encoded = self.tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"]
        return {"": [], **dict(zip(different, encoded, strict=True))}

    def _fits(self, continuation: Sequence[int]) -> bool:
        """Return whether the model takes a continuation, behind what it must see before the first token."""
        # Of mode, context and continuation the last token is no input.
        return len(continuation) + max(1, len(self._mode)) <= self.max_length + 1

    def _sequence(self, context: list[int], continuation: list[int], request: Instance | None = None) -> Scored:
        """Return [mode] context continuation, shortened at the context's beginning to what the model can take."""
        room = self.max_length - len(self._mode) + 1  # the last token is no input
        if not self._mode and not context:
            context = [self.prefix_token_id]
        if not self._fits(continuation):
            asked = f"task {request.task_name}" if request else "a request"
            raise ConfigError(
                f"{asked}: a continuation has {len(continuation):,} tokens, and the model's longest "
                f"sequence is {self.max_length:,}. Leave the task out, or evaluate a model with longer sequences."
            )
        if len(context) + len(continuation) > room:
            self.truncated.add(request and request.doc_id)
            context = context[len(context) + len(continuation) - room :]
        tokens = [*self._mode, *context, *continuation]
        return Scored(tokens, len(continuation), 0 if self.causal else len(tokens) - len(continuation))

    def _score(self, sequences: Sequence[Scored]) -> list[Likelihood]:
        numbers = [number for number, sequence in enumerate(sequences) if sequence.num_scored]
        scored = [sequences[number] for number in numbers]
        rows = self.ranks.share(lay_out(scored, longest_row=2 * self.max_length))
        done, total = 0, sum(len(row.paths) for row in rows)

        def count(more: int) -> None:
            nonlocal done
            done += more
            self._on_progress("scoring", done, total)

        found = self.ranks.merge(likelihoods(self.loaded, rows, scored, self.num_rows, count))
        by_number = {numbers[place]: likelihood for place, likelihood in found.items()}
        return [by_number.get(number, (0.0, True)) for number in range(len(sequences))]  # no tokens: certain

    def _prompt(self, context: list[int], options: Any, request: Instance) -> Prompt:
        """Return a prompt that leaves room for the continuation, or for half a sequence of it if it is longer."""
        room = self.max_length - min(options["max_gen_toks"], self.max_length // 2) - len(self._mode)
        if len(context) > room:
            self.truncated.add(request.doc_id)
        tokens = [*self._mode, *context[max(0, len(context) - room) :]] or [self.prefix_token_id]
        return Prompt(tokens, 0 if self.causal else None)

    def _continue(self, prompts: dict[int, Prompt], options: Any) -> dict[int, str]:
        is_greedy = not options["do_sample"] or options["temperature"] == 0.0
        sampling = GREEDY if is_greedy else Sampling(options["temperature"], options.get("top_k"), options.get("top_p"))
        stops = [stop for stop in options.get("until") or [] if stop]
        # Greedily, equal prompts have equal continuations. Drawn ones are numbered before ranks and batches share them.
        same: dict[Any, list[int]] = {}
        seen: Counter[tuple[int, ...]] = Counter()
        for number, prompt in prompts.items():
            tokens = tuple(prompt.tokens)
            prompts[number] = replace(prompt, repeat=seen[tokens])
            seen[tokens] += 1
            same.setdefault(tokens if is_greedy else number, []).append(number)
        longest_first = sorted(same.values(), key=lambda numbers: len(prompts[numbers[0]].tokens), reverse=True)
        mine = self.ranks.share(longest_first)
        found: dict[int, str] = {}
        for start in range(0, len(mine), self.num_rows):
            batch = mine[start : start + self.num_rows]
            continuations = self._generate([prompts[numbers[0]] for numbers in batch], options, sampling, stops)
            for numbers, continuation in zip(batch, continuations, strict=True):
                text = postprocess_generated_text(self._decode(continuation.tokens), stops, None)
                found |= dict.fromkeys(numbers, text)
            self._on_progress("generating", start + len(batch), len(mine))
        return self.ranks.merge(found)

    def _generate(
        self, prompts: Sequence[Prompt], options: Any, sampling: Sampling, stops: Sequence[str]
    ) -> list[Continuation]:
        new: list[list[int]] = [[] for _ in prompts]

        def ends(row: int, token: int) -> bool:
            new[row].append(token)
            text = self._decode(new[row])
            return any(stop in text for stop in stops)

        return generate(
            self.loaded.model, prompts, options["max_gen_toks"], self.eot_token_id, sampling, ends if stops else None
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


register_model("raptr_ds")(PrefixLM)
