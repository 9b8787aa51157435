"""Texts that were encoded before: when they are found, and everything after which they are not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from tiny_pair import PLAN, tiny_engine
from torch import Tensor, nn

import headstart as hs
from headstart.conditioning.text_cache import VARIABLE, text_cache_of
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText

Encodings = list[tuple[str, ...]]
"""The prompts of every encoding."""
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Encodings:
    found: Encodings = []
    encode: Callable[..., Any] = ClipText.encode

    def spy(self: ClipText, prompts: list[str], *args: Any, **options: Any) -> Any:
        found.append(tuple(prompts))
        return encode(self, prompts, *args, **options)

    monkeypatch.setattr(ClipText, "encode", spy)
    return found


@pytest.fixture
def engine() -> hs.Engine:
    return tiny_engine("sd15")


def _latents(engine: hs.Engine, prompts: Any = "a cat", **options: Any) -> Tensor:
    return engine.sample(prompts, plan=PLAN, seeds=3, **options).latents


def _afresh(engine: hs.Engine, prompts: Any = "a cat", **options: Any) -> Tensor:
    """With nothing kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        return _latents(engine, prompts, **options)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _lora(path: Path, layer: str, out: int, scale: float = 1.0) -> Path:
    tensors = {f"{layer}.lora_down.weight": scale * _normal(2, 32)}
    save_file(tensors | {f"{layer}.lora_up.weight": _normal(out, 2)}, path)
    return path


def test_a_text_is_encoded_once_and_the_bits_are_those_of_encoding_it_again(
    engine: hs.Engine, encodings: Encodings
) -> None:
    first = _latents(engine)
    assert torch.equal(_latents(engine), first)
    assert torch.equal(_latents(engine.with_runner("eager"), "a cat"), first)
    assert len(encodings) == 1
    assert torch.equal(_afresh(engine), first)
    assert len(encodings) == 2


BOTH: list[tuple[Any, dict[str, Any]]] = [
    ("a dog", {}),
    (["a cat", "a dog"], {}),
    ("a cat -> a dog below sigma 3", {}),
    ("a cat", {"negative": "a dog"}),
    ("a cat", {"negative": ""}),
    ("a cat", {"clip_skip": 2}),
    ("a (cat:1.5)", {"style": "a1111"}),
    ("a (cat:1.5)", {"style": "comfyui"}),
]
DIFFERENT: list[tuple[Any, dict[str, Any]]] = [
    ("a cat", {"size": 24}),
    ("a cat", {"original_size": (20, 20)}),
    ("a cat", {"crop": (4, 0)}),
    ("a cat", {"second": "a dog"}),
    ("a cat", {"negative": "the", "negative_second": "a dog"}),
]
"""SDXL's alone."""


@pytest.mark.parametrize(
    ("family", "prompts", "options"),
    [*(("sd15", *one) for one in BOTH), *(("sdxl", *one) for one in (*BOTH, *DIFFERENT))],
)
def test_whatever_is_asked_differently_is_encoded(
    family: str, prompts: Any, options: dict[str, Any], encodings: Encodings
) -> None:
    engine = tiny_engine(family)
    _latents(engine)
    latents = _latents(engine, prompts, **options)
    assert torch.equal(_latents(engine, prompts, **options), latents)
    assert len(encodings) == 2
    assert torch.equal(_afresh(engine, prompts, **options), latents)


def test_what_a_caller_writes_to_is_not_kept(
    engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart.engine import denoising

    first, encode = _latents(engine), denoising.encode

    def spoiled(*args: Any) -> Any:
        cond, uncond = encode(*args)
        for part in (cond, uncond):
            assert isinstance(part, Conditioning)
            part.context.zero_()
        return cond, uncond

    monkeypatch.setattr(denoising, "encode", spoiled)
    assert not torch.equal(_latents(engine), first)
    monkeypatch.undo()
    assert torch.equal(_latents(engine), first)


def _written(text: nn.Module) -> None:
    with torch.no_grad():
        next(text.parameters()).mul_(1.5)


def _replaced(text: Any) -> None:
    layer = text.towers[0].text_model.encoder.layers[0].mlp
    other = nn.Linear(layer.fc1.in_features, layer.fc1.out_features)
    layer.fc1 = other.requires_grad_(False)


def _another_tower(text: Any) -> None:
    text.towers[0] = copy.deepcopy(text.towers[0])
    _written(text)


CHANGES: dict[str, Callable[[Any], object]] = {
    "written": _written,
    "assigned": lambda text: text.load_state_dict(
        {name: 1.5 * weight for name, weight in text.state_dict().items()}, assign=True
    ),
    "replaced": _replaced,
    "halved": lambda text: text.to(torch.bfloat16).to(torch.float32),
    "another tower": _another_tower,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_encoders_encode_again(
    change: str, engine: hs.Engine, encodings: Encodings
) -> None:
    first = _latents(engine)
    CHANGES[change](engine.weights.text)
    second = _latents(engine)
    assert len(encodings) == 2 and not torch.equal(first, second)
    assert torch.equal(_afresh(engine), second)
    for _ in range(3):  # and what they encode now is kept
        assert torch.equal(_latents(engine), second)
    assert len(encodings) <= 4


# act(layer, factor): the factor may change while it acts
ACTS: dict[str, Callable[[Any, list[float]], object]] = {
    "a hook": lambda layer, factor: layer.register_forward_hook(
        lambda layer, args, y: factor[0] * y
    ),
    "a hook before": lambda layer, factor: layer.register_forward_pre_hook(
        lambda layer, args: (factor[0] * args[0],)
    ),
    "a forward of its own": lambda layer, factor: setattr(
        layer, "forward", lambda x, under=layer.forward: factor[0] * under(x)
    ),
}


@pytest.mark.parametrize("act", ACTS)
def test_encoders_that_somebody_acts_on_encode_every_time(act: str, engine: hs.Engine) -> None:
    factor, text = [1.5], cast("Any", engine.weights.text)
    latents = [_latents(engine)]
    ACTS[act](text.towers[0].text_model.encoder.layers[0].mlp.fc1, factor)
    latents.append(_latents(engine))
    factor[0] = 0.5
    latents.append(_latents(engine))
    assert not any(torch.equal(a, b) for a, b in combinations(latents, 2))
    assert torch.equal(_afresh(engine), latents[-1])


def test_encoders_that_wait_elsewhere_are_brought_for_an_encoding_alone(
    engine: hs.Engine, encodings: Encodings
) -> None:
    brought: list[str] = []

    @contextmanager
    def bring() -> Generator[None]:
        brought.append("text")
        with torch.no_grad():
            for tensor in text.parameters():
                tensor.copy_(tensor.clone())  # as a copy from the host does
        yield

    text = engine.weights.text
    first = _latents(engine)
    vars(text.towers[0])["in_place"] = bring
    for _ in range(3):
        assert torch.equal(_latents(engine), first)
    assert len(brought) == 1 and len(encodings) == 2
    _latents(engine, "a dog")
    assert len(brought) == 2
    assert torch.equal(_afresh(engine), first) and len(brought) == 3


def test_what_is_written_through_data_is_seen_after_clear(engine: hs.Engine) -> None:
    first = _latents(engine)
    next(engine.weights.text.parameters()).data.mul_(1.5)
    text_cache_of(engine.weights.text).clear()
    assert not torch.equal(_latents(engine), first)


@pytest.mark.parametrize("form", ["lora", "loha"])
def test_an_adapter_of_the_text_is_heard_at_every_strength(
    form: str, engine: hs.Engine, tmp_path: Path
) -> None:
    path = _lora(tmp_path / "voice.safetensors", FC1, 48)
    if form == "loha":  # merged into the layers; a LoRA acts beside them
        halves = {"w1_a": (48, 2), "w1_b": (2, 32), "w2_a": (48, 2), "w2_b": (2, 32)}
        tensors = {f"{FC1}.hada_{name}": _normal(*shape) for name, shape in halves.items()}
        tensors |= {f"{TO_Q}.hada_{n}": _normal(32 if s[0] == 48 else 2, s[1])
                    for n, s in halves.items()}  # fmt: skip
        save_file(tensors, path)
    plain = _latents(engine)
    engine.attach(path, 1.0, name="voice")
    results = [plain]
    for strength in (1.0, 0.5, 1.0, 2.0):
        engine.adapters["voice"].strength = strength
        results.append(_latents(engine))
        assert torch.equal(_latents(engine), results[-1])
        assert torch.equal(_afresh(engine), results[-1])
    assert torch.equal(results[1], results[3])
    assert len({bytes(one.numpy()) for one in results}) == 4
    engine.detach("voice")
    assert torch.equal(_latents(engine), plain)


def test_an_adapter_that_is_swapped_in_place_is_heard(engine: hs.Engine, tmp_path: Path) -> None:
    one = _lora(tmp_path / "one.safetensors", FC1, 48)
    other = _lora(tmp_path / "other.safetensors", FC1, 48, scale=-2.0)
    engine.attach(one, name="voice")
    first = _latents(engine)
    assert engine.attach(other, name="voice", replace=True).in_place
    second = _latents(engine)
    assert not torch.equal(first, second)
    assert torch.equal(_afresh(engine), second)


def test_an_interrupted_network_leaves_its_adapters_to_nobody(
    engine: hs.Engine, tmp_path: Path
) -> None:
    """KeyboardInterrupt passes by the hooks in which a call ends."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    text = engine.weights.text
    engine.attach(_lora(tmp_path / "a.safetensors", FC1, 48, scale=3.0))
    engine.attach(_lora(tmp_path / "b.safetensors", TO_Q, 32))
    before, latents = text.encode(["a cat"]).context, _latents(engine)
    handle = cast("Any", engine.denoisers["base"]).conv_out.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        _latents(engine)
    handle.remove()
    assert torch.equal(text.encode(["a cat"]).context, before)
    assert torch.equal(_latents(engine), latents)


def test_strengths_of_one_call_are_told_apart(engine: hs.Engine, tmp_path: Path) -> None:
    engine.attach(_lora(tmp_path / "voice.safetensors", FC1, 48), 0.0)
    latents = [
        _latents(engine, f"a cat <lora:voice:{strength}>") for strength in (0.0, 1.0, 2.0, 1.0)
    ]
    assert torch.equal(latents[1], latents[3])
    assert len({bytes(one.numpy()) for one in latents}) == 3


def test_an_adapter_of_the_unet_alone_does_not_encode_again(
    engine: hs.Engine, tmp_path: Path, encodings: Encodings
) -> None:
    first = _latents(engine)
    engine.attach(_lora(tmp_path / "ink.safetensors", TO_Q, 32))
    for strength in (1.0, 2.0):
        engine.adapters["ink"].strength = strength
        assert not torch.equal(_latents(engine), first)
    assert len(encodings) == 1


def test_the_least_recently_used_goes_first(
    engine: hs.Engine, encodings: Encodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _latents(engine)
    cache = text_cache_of(engine.weights.text)
    one = cache.size_bytes
    assert one == 2 * 16 * 32 * 4  # cond and uncond of 16 tokens
    monkeypatch.setenv(VARIABLE, str(2.5 * one / 1e6))
    for prompt in ("a dog", "a cat", "the cat", "a cat"):
        _latents(engine, prompt)
    assert [texts[0] for texts in encodings] == ["a cat", "a dog", "the cat"]
    assert len(cache) == 2 and cache.size_bytes == 2 * one
    _latents(engine, "a dog")
    assert len(encodings) == 4
    monkeypatch.setenv(VARIABLE, str(0.5 * one / 1e6))
    _latents(engine, "the")
    assert len(cache) == 0


def test_weights_are_freed_with_their_engine() -> None:
    engine = tiny_engine("sd15")
    _latents(engine)
    gone = weakref.ref(engine.weights.text.towers[0])
    del engine
    gc.collect()
    assert gone() is None


def test_threads_share_what_is_kept_and_each_gets_its_own(engine: hs.Engine) -> None:
    prompts = ["a cat", "a dog", "the cat"]
    expected = {prompt: _afresh(engine, prompt) for prompt in prompts}
    requests = [prompts[(start + turn) % 3] for start in range(3) for turn in range(4)]
    with ThreadPoolExecutor(3) as threads:
        latents = list(threads.map(lambda prompt: _latents(engine, prompt), requests))
    assert all(
        torch.equal(actual, expected[prompt])
        for prompt, actual in zip(requests, latents, strict=True)
    )
    assert len(text_cache_of(engine.weights.text)) == 3


def test_who_watches_operators_or_counts_no_versions_gets_an_encoding(
    encodings: Encodings,
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    engine = tiny_engine("sd15")
    _latents(engine)
    with FlopCounterMode(display=False):
        _latents(engine)
    assert len(encodings) == 2
    with torch.inference_mode():
        unseen = tiny_engine("sd15")
        for _ in range(2):
            _latents(unseen)
    assert len(encodings) == 4


def test_the_time_of_the_text_is_what_it_took(engine: hs.Engine) -> None:
    runs = [engine.sample("a cat", plan=PLAN, seeds=3) for _ in range(6)]
    first, *others = (run.latency_ms["text"] for run in runs)
    assert 0 < min(others) < first
