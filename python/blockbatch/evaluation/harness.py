"""The model "blockbatch" of lm-evaluation-harness: `lm_eval --model blockbatch --model_args pretrained=...`.

It answers requests of the type generate_until, greedily, and those for log-likelihoods by the bound of
`blockbatch.models.likelihood`, since a masked diffusion model has no probability of a text token by token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(
        f"expected the package lm_eval 0.4.13 or newer: pip install 'blockbatch[lm-eval]' ({error})"
    ) from error

from blockbatch.branches import NFE, BlockNFE
from blockbatch.config import DecodeConfig
from blockbatch.evaluation import harness_likelihood
from blockbatch.evaluation.harness_likelihood import LikelihoodSettings
from blockbatch.evaluation.harness_options import (
    DEFAULT_GEN_LENGTH,
    Wishes,
    decode_options,
    length_unit,
    read_batch_size,
)
from blockbatch.generation import Result, decode
from blockbatch.methods import METHOD_OPTIONS
from blockbatch.models import load_model
from blockbatch.plugins import load_plugin
from blockbatch.prompts import encode_prompt
from blockbatch.sampling_options import sampling_settings
from blockbatch.stops import cut
from blockbatch.texts import check_text

logger = logging.getLogger(__name__)


class BlockBatchLM(LM):
    """LLaDA or Dream, decoded by BlockBatch or a baseline.

    The length to generate is `gen_length`, its own or the preset's. Where neither is given, the task's
    max_gen_toks (256 if it has none) is rounded up to what the block sizes divide, and longer texts are cut.

    Args:
        pretrained: as `blockbatch.load_model`: "tiny", a folder or a hub id.
        preset: a benchmark of the paper (see `blockbatch.evaluation.presets`), or named settings of a decode
            ("paper", "fast"; see `DecodeConfig.preset`); `options` change its settings.
        decode_preset: named settings of a decode beside a benchmark: preset=gsm8k,decode_preset=fast.
        add_bos_token: whether every prompt begins with the tokenizer's beginning-of-sequence token, once.
            Left out: as tokenizer_config.json says, but for prompts in the chat format.
        escape_until: texts are not cut at a task's stop sequences, which do not end decoding either; a later
            step of one's own does it, as for the paper's runs of Dream.
        batch_size: prompts that are decoded together.
        device, dtype, backend, revision, quantization, kv_dtype, adapter: as `load_model`.
        plugin: Python file or module that registers methods of one's own; it is run.
        stop_early: whether a stop sequence ends decoding, rather than only the text. Left out: yes, but for
            the presets of methods that fill their canvas, whose published forward counts include all of it.
        likelihood_samples, likelihood_seed: maskings of every answer whose likelihood is asked for.
        check_greedy: whether it is looked up too if greedy decoding writes that answer, a token a forward.
        trust_remote_code: is not needed: no code of a model's repository is ever run.
        max_batch_size: has no effect, since `batch_size` is a number.
        options: arguments of `DecodeConfig`; sequences as 4:8:16 or [4,8,16].

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        preset: str | None = None,
        decode_preset: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        revision: str | None = None,
        quantization: str | None = None,
        kv_dtype: str | None = None,
        adapter: str | None = None,
        plugin: str | None = None,
        stop_early: bool | None = None,
        add_bos_token: bool | None = None,
        escape_until: bool = False,
        likelihood_samples: int = 128,
        likelihood_seed: int = 0,
        check_greedy: bool = False,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch_size = read_batch_size(batch_size)
        if plugin is not None:
            load_plugin(plugin)
        self._options = decode_options(preset, options, decode_preset)
        self._fixed_length = self._options.pop("gen_length", None)
        flags = {"stop_early": stop_early, "add_bos_token": add_bos_token, "escape_until": escape_until}
        for name, flag in flags.items():
            if not isinstance(flag, bool) and not (flag is None and name != "escape_until"):
                raise TypeError(f"{name}: expected true or false, got {flag!r}")
        self.escape_until, self._add_bos, self._chats = escape_until, add_bos_token, False
        self._likelihood = LikelihoodSettings(likelihood_samples, likelihood_seed, check_greedy)
        # What does not depend on a request is refused before the model is loaded.
        config = self._config(Wishes((), DEFAULT_GEN_LENGTH))
        self.model = load_model(
            pretrained,
            device=device,
            dtype=dtype,
            backend=backend,
            revision=revision,
            quantization=quantization,
            kv_dtype=kv_dtype,
            adapter=adapter,
        )
        # The end is that of the model's family where the policy is.
        fills_canvas = preset is not None and config.for_model(self.model.spec).eos_exit == "none"
        self.stop_early = not fills_canvas if stop_early is None else stop_early
        if self.model.tokenizer is None:
            raise ValueError(f"pretrained: expected a model with a tokenizer, got {pretrained!r} without one")
        if add_bos_token and self.model.tokenizer.bos_token_id is None:
            raise ValueError(f"add_bos_token: expected a tokenizer with a bos_token, got {pretrained!r}")
        self._device = self.model.device
        self._requests, self._tokens, self._adopted, self._seconds = 0, 0, 0, 0.0
        counts = NFE if self.model.spec.block_size is None else BlockNFE
        self._forwards = {field.name: 0 for field in fields(counts)}

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> BlockBatchLM:
        """The model of `model_args`, which count more than the command line's own device and batch size."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # The command line says so when it was told nothing, whether there is a GPU or not.
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():
            del given["device"]
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> BlockBatchLM:
        """As `create_from_arg_obj`, of a text such as "pretrained=tiny,method=vanilla"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Positions for a prompt and what is generated."""
        return self.model.spec.max_length

    @property
    def tokenizer_name(self) -> str:
        """Tells saved requests of different tokenizers and chat formats apart."""
        return f"blockbatch_{self.model.spec.family}_{self.model.name}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat format, shown on an example; empty if none is asked for.

        Raises:
            ValueError: a template is asked for by its name: the formats are built in.
            CheckpointError: the tokenizer lacks the tokens of the format.
        """
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template: expected no name, since every family has one format built in, got "
                f"{chat_template!r}"
            )
        if not chat_template:
            return ""
        roles = ("system", "user", "assistant", "user")
        return self._chat([{"role": role, "content": f"({role})"} for role in roles])

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that asks for the assistant's next turn, or goes on with its last (the beginning of an
        answer).

        Raises:
            ValueError, CheckpointError: as `blockbatch.models.chat.format_chat`.
        """
        self._chats = True
        if add_generation_prompt:
            return self._chat(chat_history)
        *before, last = chat_history
        if last["role"] != "assistant":
            raise ValueError(f"chat_history: expected a last turn of the assistant, got {last['role']!r}")
        return self._chat(before) + last["content"]

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.model.tokenizer.chat(list(messages), self.model.spec.family)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, before the first stop sequence of its `until`.

        A prompt that holds half a character, which has no token, gets an empty text and a warning; it does
        not end the evaluation.

        Raises:
            ValueError, TypeError: for the first request that cannot be decoded, before any is.
        """
        from tqdm import tqdm

        wishes = [Wishes.read(request.args[1]) for request in requests]
        if self.escape_until:
            wishes = [wish._replace(until=()) for wish in wishes]
        configs = [self._config(wish, wish.until if self.stop_early else ()) for wish in wishes]
        prompts = [
            self._prompt(request, f"request[{index}]", config)
            for index, (request, config) in enumerate(zip(requests, configs, strict=True))
        ]
        groups: dict[tuple[DecodeConfig, Wishes], list[int]] = {}
        texts: dict[int, str] = {}
        for index, key in enumerate(zip(configs, wishes, strict=True)):
            if prompts[index] is None:
                texts[index] = ""
            else:
                groups.setdefault(key, []).append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for (config, wish), group in groups.items():
                # Prompts of about one length waste least; the longest first, to run out of memory at once.
                group.sort(key=lambda index: -len(prompts[index]))
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    for index, result in zip(batch, self._decode([prompts[i] for i in batch], config, batch)):
                        texts[index] = self._text(result, wish)
                        self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                    bar.update(len(batch))
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of every request's continuation (a lower bound, estimated), and whether greedy
        decoding writes it: False where `check_greedy` is off.

        Raises:
            ValueError: the model is of block diffusion; or a continuation is longer than the model.
        """
        return harness_likelihood.answers(self.model, self._likelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of every request's whole text, estimated window by window."""
        return harness_likelihood.rolling(self.model, self._likelihood, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results file: how was decoded, and what the requests so far took.

        NFE and adopted (forwards taken over from drafts) are means over the requests; tokens (before an EOS
        or stop sequence) and seconds are sums.
        """
        config = self._config(Wishes((), DEFAULT_GEN_LENGTH))
        names = ("method", *METHOD_OPTIONS[config.method], "eos_token_ids")
        nfe = {phase: count / max(self._requests, 1) for phase, count in self._forwards.items()}
        return {
            "model_device": str(self.model.device),
            "model_dtype": self.model.numbers,
            "decoding": {
                **{name: getattr(config, name) for name in names},
                **sampling_settings(config),
                "gen_length": self._fixed_length,
                "stop_early": self.stop_early,
                "add_bos_token": self._begins_with_bos(),
                "escape_until": self.escape_until,
            },
            "decoded": {
                "requests": self._requests,
                "nfe": {**nfe, "total": sum(nfe.values())},
                "adopted": self._adopted / max(self._requests, 1),
                "tokens": self._tokens,
                "seconds": self._seconds,
            },
        }

    def _config(self, wish: Wishes, stop: tuple[str, ...] = ()) -> DecodeConfig:
        length = self._fixed_length
        if length is None:
            unit = length_unit(self._options, wish.max_gen_toks)
            length = -(-wish.max_gen_toks // unit) * unit
        return DecodeConfig(gen_length=length, stop=stop, **self._options)

    def _begins_with_bos(self) -> bool:
        """Whether prompts get the token that begins a text."""
        if self._add_bos is not None:
            return self._add_bos
        return self.model.tokenizer.add_bos and not self._chats

    def _prompt(self, request: Instance, name: str, config: DecodeConfig) -> list[int] | None:
        """The prompt's ids, without its beginning where the whole does not fit; None for half a character."""
        context = request.args[0]
        try:
            check_text(context, f"{name} (task {request.task_name}, doc {request.doc_id})")
        except ValueError as error:
            logger.warning("%s; its answer is left empty", error)
            return None
        ids = encode_prompt(self.model, context, name, add_bos=self._begins_with_bos())
        # A text of a block-causal model ends with a whole block.
        size = config.block_size or self.model.spec.block_size or 1
        whole = 1 if self.model.spec.block_size is None else size
        room = self.max_length // whole * whole - config.gen_length
        if room < 1:
            raise ValueError(
                f"gen_length: expected less than the {self.max_length} positions of the model, got "
                f"{config.gen_length}"
            )
        begin = ids[:1] if self._begins_with_bos() else []
        if len(ids) > room:
            logger.warning(
                "a prompt of %d tokens and gen_length = %d do not fit in %d positions: its first %d tokens "
                "are left out",
                len(ids),
                config.gen_length,
                self.max_length,
                len(ids) - room,
            )
            return begin + ids[len(ids) - room + len(begin) :]
        return ids

    def _decode(self, prompts: list[list[int]], config: DecodeConfig, numbers: Sequence[int]) -> list[Result]:
        started = time.perf_counter()
        results = decode(self.model, prompts, config, numbers=numbers)
        self._seconds += time.perf_counter() - started
        self._requests += len(results)
        self._tokens += sum(len(result.tokens) for result in results)
        self._adopted += sum(result.adopted for result in results)
        for phase in self._forwards:
            self._forwards[phase] += sum(getattr(result.nfe, phase) for result in results)
        return results

    def _text(self, result: Result, wish: Wishes) -> str:
        tokens = result.tokens
        if self._fixed_length is None and len(tokens) > wish.max_gen_toks:
            tokens = tokens[: wish.max_gen_toks]
        elif self.stop_early:
            return result.text
        return cut(self.model.tokenizer, tokens, wish.until, ())[1]
