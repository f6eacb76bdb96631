"""The engine as a model of the LM Evaluation Harness. Needs `pip install 'litgpt[eval]'`."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from litgpt.engine.loading import Ready
from litgpt.engine.sampling import Sampling
from litgpt.eval.generating import Prompt, generate_texts
from litgpt.eval.scoring import Request, Scorer
from litgpt.kvcache import CacheSpec
from litgpt.prompt_style import eos_ids
from litgpt.waiting import report_progress, waiting

MAX_GEN_TOKS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing, the first counts


class EngineLM(TemplateLM):
    """A loaded model with key-value caches of any kind.

    Args:
        ready: the model.
        spec: which caches.
        batch_size: most answers that are generated together; log-probabilities do not depend on it.
        prompt_chunksize: most tokens of a prefill call (None: the whole prompt).
        seed: of the random draws of tasks that ask for them.
    """

    def __init__(
        self,
        ready: Ready,
        spec: CacheSpec | None = None,
        batch_size: int = 8,
        prompt_chunksize: int | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.ready, self.batch_size, self.seed = ready, batch_size, seed
        self.spec = CacheSpec() if spec is None else spec
        self.prompt_chunksize = prompt_chunksize
        self._scorer = Scorer(ready.model, self.spec, prompt_chunksize)

    # -- what the harness asks about

    @property
    def eot_token_id(self) -> int:
        return eos_ids(self.ready.tokenizer)[0]

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.ready.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_length(self) -> int:
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return self.ready.checkpoint_dir.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return getattr(self.ready.prompt_style, "template", type(self.ready.prompt_style).__name__)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self.ready.prompt_style.render(chat_history)
        *before, last = chat_history  # the beginning of an answer, which goes on
        return self.ready.prompt_style.render(before) + last["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.ready.tokenizer.encode(string, bos=add_special_tokens).tolist()

    # -- scores

    def _score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with waiting("Scoring", log=True):
            scores = self._scorer.score(requests, report_progress)
        return [(score.total, score.greedy) for score in scores]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([self._request(context, rest) for _, context, rest in requests], disable_tqdm)

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """A request without the first tokens of a context that is too long."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        n = min(len(continuation), len(whole) - 1)
        return Request(tuple(whole[:-n]), tuple(whole[-n:]))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        numbers: list[int] = []
        for i, one in enumerate(requests):
            tokens = self.tok_encode(one.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(self._request(*make_disjoint_window(pair)))
                numbers.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(numbers, self._score(windows, disable_tqdm), strict=True):
            totals[i] += total
        return totals

    # -- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self._prompt(*one.args) for one in requests]
        with waiting("Generating", log=True):
            return generate_texts(
                self.ready, prompts, self.spec, self.batch_size, self.prompt_chunksize, report_progress
            )

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> Prompt:
        until = settings.get("until") or []
        most = next((int(settings[name]) for name in _LIMITS if settings.get(name) is not None), MAX_GEN_TOKS)
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"the task asks for {most} tokens, the model or its cache takes {self.max_length}")
        temperature = settings.get("temperature") or 0.0
        draws = settings.get("do_sample", temperature > 0) and temperature > 0
        sampling = Sampling(
            temperature=temperature if draws else 0.0,
            top_k=settings.get("top_k") or None,
            top_p=settings.get("top_p") or 1.0,
            seed=self.seed,
        )
        tokens = tuple(self.tok_encode(context, add_special_tokens=None)[-room:])
        return Prompt(tokens, most, (until,) if isinstance(until, str) else tuple(until), sampling)
