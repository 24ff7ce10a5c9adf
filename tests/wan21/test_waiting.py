"""What streamed weights need of pinned host memory, worked out beforehand, is what they take."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from wan21.clip.model import ImageEncoder
from wan21.components import DTYPES, Components
from wan21.dit.model import Dit
from wan21.errors import UsageError
from wan21.events import SILENT
from wan21.layout import Layout
from wan21.memory.parked import parameters_below
from wan21.models import MODELS, ModelSpec
from wan21.options import LoadStrategy, Options
from wan21.parallel.world import Group, World
from wan21.parts import all_in_parts
from wan21.runtime import CpuRuntime
from wan21.text.umt5 import TextEncoder
from wan21.waiting import GIB, check_host_room, streamed, whole_pages
from wan21.weights.random import RandomWeights

PAGE_GIB = whole_pages(1) / GIB


def sizes(parameters: Iterable[nn.Parameter]) -> list[int]:
    return sorted(one.numel() * one.element_size() for one in parameters)


def network(spec: ModelSpec, name: str, options: Options) -> Dit | TextEncoder | ImageEncoder:
    with torch.device("meta"):
        if name == "dit":
            return Dit(spec.dit, dtype=DTYPES[options.precision])
        if name == "t5":
            return TextEncoder(spec.text, dtype=DTYPES[options.t5_precision])
        assert spec.clip is not None
        image_encoder = ImageEncoder(spec.clip, dtype=DTYPES[options.clip_precision])
        image_encoder.drop_unread()
        return image_encoder


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_those_of_the_networks_that_are_streamed(model: str) -> None:
    spec = MODELS[model]
    options = Options(precision="bf16", t5_precision="fp32", clip_precision="fp16")
    components = streamed(spec, options, "cuda")
    assert {one.name for one in components} == {"dit", "t5"} | ({"clip"} if spec.clip else set())
    for one in components:
        module = network(spec, one.name, options)
        is_dit = isinstance(module, Dit)
        blocks = [
            [sizes(weights.values()) for part, weights in block.part_parameters().items() if part and weights]
            for block in all_in_parts(module.sequence().values() if is_dit else module.blocks)
        ]
        assert blocks == [[sorted(part) for part in block] for block in one.blocks]
        assert sizes(parameters_below(module, Dit.ONCE).values()) == sorted(filter(None, one.once))
        table = module.token_embedding.weight if isinstance(module, TextEncoder) else torch.empty(0, 0)
        assert one.table == (table.shape[1] * table.element_size(), table.shape[0])


def test_a_text_encoder_on_the_cpu_is_streamed_only_where_all_is_there() -> None:
    options = Options(t5_cpu=True)
    assert [one.name for one in streamed(MODELS["tiny"], options, "cuda")] == ["dit"]
    assert [one.name for one in streamed(MODELS["tiny"], options, "cpu")] == ["dit", "t5"]


def taken(spec: ModelSpec, options: Options) -> dict[str, int]:
    """What each streamed component has on the host of the first of several processes, once it is loaded."""
    runtime, num_ranks = CpuRuntime(), options.layout.world_size
    world = World(layout=options.layout, everyone=Group(tuple(range(num_ranks))))
    components = Components(spec, options, RandomWeights(spec, 0, runtime.generator), runtime, SILENT, world)
    found = {}
    for name in ("dit", "t5", "clip") if spec.clip else ("dit", "t5"):
        component = getattr(components, name)()
        found[name] = runtime.host_buffer_bytes()
        del component
    return found


@pytest.mark.parametrize(
    ("model", "strategy", "ulysses", "resident_gib"),
    [
        ("tiny", "block", 1, 0.0),
        ("tiny", "part", 2, 0.0),
        ("tiny-vace", "block", 2, 0.003),
        ("tiny-vace", "part", 1, 0.003),
        ("tiny-flf2v", "part", 1, 0.0),
        ("tiny", "part", 1, 1.0),
    ],
)
def test_all_is_loaded_within_the_least_budget_and_none_smaller_is_let_through(
    model: str, strategy: LoadStrategy, ulysses: int, resident_gib: float
) -> None:
    spec = MODELS[model]

    def options(budget_gib: float) -> Options:
        return Options(
            ckpt_dir="where these come from",  # weights that could be read again
            load_strategy=strategy,
            host_budget_gib=budget_gib,
            resident_gib=resident_gib,
            layout=Layout(ulysses=ulysses),
        )

    least = max(
        one.least_bytes(strategy, int(resident_gib * GIB), ulysses) for one in streamed(spec, options(1.0), "cpu")
    )
    assert max(taken(spec, options(least / GIB)).values()) == least
    with pytest.raises(UsageError, match=r"is too little: with load_strategy=\w+ \w+ needs "):
        taken(spec, options(least / GIB - PAGE_GIB))


@pytest.mark.parametrize(
    ("strategy", "t5_cpu", "neediest", "gib", "elsewise"),
    [
        ("part", False, "t5", 2.66, "; with load_strategy=block 1.964 is enough"),
        ("block", True, "dit", 1.964, "; with load_strategy=part 1.173 is enough"),
        ("block", False, "dit", 1.964, ""),
    ],
)
def test_the_least_that_works_is_told_and_the_other_strategy_where_it_takes_less(
    strategy: LoadStrategy, *, t5_cpu: bool, neediest: str, gib: float, elsewise: str
) -> None:
    options = Options(load_strategy=strategy, t5_cpu=t5_cpu, host_budget_gib=1.5)
    with pytest.raises(UsageError) as caught:
        check_host_room(MODELS["t2v-14B"], options, "cuda")
    assert str(caught.value) == (
        f"host_budget_gib=1.5 is too little: with load_strategy={strategy} {neediest} needs {gib} GiB, for what waits "
        "on the host in any case and a ring of 3 buffers for the rest; "
        f"choose {gib} or more, or null, which pins all{elsewise}"
    )
