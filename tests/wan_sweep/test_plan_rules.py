from pathlib import Path
from typing import Any

import pytest

from wan_sweep.environment import Gpu, Machine
from wan_sweep.place import Place
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, Scalar

H100 = Gpu(name="NVIDIA H100", total_bytes=80 * 2**30, used_bytes=0)
NO_GPU = Machine(torch_version="2.13.0+cpu")
ONE_GPU = Machine(gpus=(H100,), torch_version="2.13.0")
TWO_GPUS = Machine(gpus=(H100, H100), torch_version="2.13.0")
A_4090 = Machine(
    gpus=(Gpu(name="NVIDIA GeForce RTX 4090", total_bytes=24564 * 2**20, used_bytes=0),), torch_version="2.13.0"
)
UNKNOWN_GPU = Machine(gpus=(Gpu(name="NVIDIA X1", total_bytes=2**36, used_bytes=0),), torch_version="2.13.0")
WORLD_OF_TWO = Machine(gpus=(H100, H100), torch_version="2.13.0", world=Place(size=2, local_size=2))
CPU_TORCH = Machine(gpus=(H100,), torch_version="2.13.0+cpu")


def test_resolving_leaves_nothing_open() -> None:
    job = resolve(Job(mode="measure"), NO_GPU).job
    assert (
        job.model,
        job.device,
        job.mode,
        job.size,
        job.frame_num,
        job.sample_steps,
    ) == ("tiny", "cpu", "measure", "160*96", 9, 4)
    assert None not in (job.prompt, job.sample_shift, job.sample_guide_scale)
    assert job == resolve(job, NO_GPU).job


@pytest.mark.parametrize(
    ("machine", "knobs", "expected"),
    [
        (NO_GPU, {}, ("estimate", "cuda", "H100-80GB", "t2v-1.3B")),
        (NO_GPU, {"model": "tiny"}, ("estimate", "cuda", "H100-80GB", "tiny")),
        (NO_GPU, {"model": "tiny", "device": "cpu"}, ("measure", "cpu", None, "tiny")),
        (CPU_TORCH, {"card": "RTX4090-24GB"}, ("estimate", "cuda", "RTX4090-24GB", "t2v-1.3B")),
        (ONE_GPU, {}, ("measure", "cuda", None, "t2v-1.3B")),
        (ONE_GPU, {"card": "RTX4060-8GB"}, ("estimate", "cuda", "RTX4060-8GB", "t2v-1.3B")),
        (ONE_GPU, {"mode": "estimate"}, ("estimate", "cuda", "H100-80GB", "t2v-1.3B")),
        (A_4090, {"mode": "estimate"}, ("estimate", "cuda", "RTX4090-24GB", "t2v-1.3B")),
        (UNKNOWN_GPU, {"mode": "estimate"}, ("estimate", "cuda", "H100-80GB", "t2v-1.3B")),
    ],
)
def test_a_job_is_measured_where_it_can_be_and_estimated_for_a_card_else(
    machine: Machine, knobs: dict[str, Scalar], expected: tuple[str | None, ...]
) -> None:
    one = resolve(Job().replace(**knobs), machine)
    assert one.refusal == ""
    assert (one.job.mode, one.job.device, one.job.card, one.job.model) == expected
    assert one.job == resolve(one.job, machine).job


def test_with_a_gpu_the_default_is_full_size_on_it() -> None:
    job = resolve(Job(), ONE_GPU).job
    assert (
        job.model,
        job.device,
        job.size,
        job.frame_num,
        job.sample_steps,
    ) == ("t2v-1.3B", "cuda", "832*480", 81, 50)


@pytest.mark.parametrize(
    ("machine", "knobs", "reason"),
    [
        (
            ONE_GPU,
            {"size": "100*100"},
            "size=100*100 is not a size of t2v-1.3B; choose 480*832, 832*480",
        ),
        (
            NO_GPU,
            {"frame_num": 80},
            "frame_num=80 is not of the form 4n+1, which the VAE needs; choose 77 or 81",
        ),
        (
            ONE_GPU,
            {"ulysses_size": 5},
            (
                "num_heads=12 of t2v-1.3B is not divisible by ulysses_size=5; choose 1, 2, 3, 4, 6 or 12, "
                "and ring_size for the rest"
            ),
        ),
        (
            ONE_GPU,
            {"cfg_parallel": True},
            "cfg_parallel=true needs 2 GPUs, this machine has 1; choose sizes whose product is at most 1",
        ),
        (
            TWO_GPUS,
            {"ulysses_size": 2, "ring_size": 2},
            "ulysses_size=2, ring_size=2 needs 4 GPUs, this machine has 2; choose sizes whose product is at most 2",
        ),
        (
            TWO_GPUS,
            {"dit_fsdp": True},
            (
                "dit_fsdp=true shards weights over ranks, and there is one; choose ulysses_size, ring_size or "
                "cfg_parallel so that there are several, or dit_fsdp=false"
            ),
        ),
        (
            WORLD_OF_TWO,
            {},
            (
                "ulysses_size=1 makes 1 rank, and torchrun has started 2; choose sizes whose product is 2, or start "
                "the sweep without torchrun"
            ),
        ),
        (
            WORLD_OF_TWO,
            {"ulysses_size": 2, "cfg_parallel": True},
            (
                "ulysses_size=2, cfg_parallel=true makes 4 ranks, and torchrun has started 2; choose sizes whose "
                "product is 2, or start the sweep without torchrun"
            ),
        ),
        (
            Machine(gpus=(H100,), torch_version="2.13.0", world=Place(size=4, local_size=2)),
            {"ring_size": 4},
            "ring_size=4 needs 2 GPUs on each machine, this one has 1; start fewer processes on it",
        ),
        (
            NO_GPU,
            {"device": "cuda"},
            (
                "device=cuda cannot be: there is no NVIDIA GPU that this process may use; choose device=cpu or "
                "mode=estimate"
            ),
        ),
        (
            CPU_TORCH,
            {"device": "cuda"},
            (
                "device=cuda cannot be: torch 2.13.0+cpu is built without CUDA; "
                "install a CUDA build of torch, or choose device=cpu or mode=estimate"
            ),
        ),
        (
            ONE_GPU,
            {"mode": "measure", "card": "H100-80GB"},
            (
                "card=H100-80GB is for estimates, and mode=measure measures what is here; leave the card out, or "
                "choose mode=estimate"
            ),
        ),
        (
            NO_GPU,
            {"mode": "estimate", "device": "cpu"},
            (
                "device=cpu cannot be estimated, for estimates are of cards; leave card and mode=estimate out to "
                "measure on the CPU, or leave device=cpu out"
            ),
        ),
        (
            NO_GPU,
            {"trace": True},
            (
                "trace=true needs a run that can be watched, and mode=estimate runs nothing; choose trace=false "
                "(an estimate names what fills the card without it), or mode=measure"
            ),
        ),
        (NO_GPU, {"base_seed": -1}, "base_seed=-1 is outside 0 to 2**63 - 1"),
        (
            NO_GPU,
            {"host_budget_gib": 4.0, "load_strategy": "part", "device": "cpu"},
            (
                "host_budget_gib=4 reads weights from a checkpoint's files again and again, and random ones are drawn; "
                "choose ckpt_dir=FOLDER (scripts/make_tiny_checkpoint.py --model NAME writes one with random weights), "
                "or host_budget_gib=null"
            ),
        ),
        (
            NO_GPU,
            {"model": "t2v-1.3B", "host_budget_gib": 1.0, "load_strategy": "block"},
            (
                "host_budget_gib=1 is too little: with load_strategy=block t5 needs 1.079 GiB, for what waits on the "
                "host in any case and a ring of 3 buffers for the rest; choose 1.079 or more, or null, which pins all"
            ),
        ),
        (
            NO_GPU,
            {"ckpt_dir": "/nowhere", "device": "cpu"},
            "ckpt_dir=/nowhere does not exist; give the official checkpoint folder of tiny, or null for random weights",
        ),
    ],
)
def test_an_impossible_job_is_refused_with_value_rule_and_way_out(
    machine: Machine, knobs: dict[str, Scalar], reason: str
) -> None:
    assert reason == resolve(Job().replace(**knobs), machine).refusal


def test_an_empty_checkpoint_folder_is_refused_by_name(tmp_path: Path) -> None:
    refusal = resolve(Job(ckpt_dir=str(tmp_path)), NO_GPU).refusal
    assert str(tmp_path) in refusal


def test_a_file_is_no_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "is not a folder" in resolve(Job(ckpt_dir=str(tmp_path / "x")), NO_GPU).refusal


@pytest.mark.parametrize(
    ("capability", "packages", "precision", "expected"),
    [
        ("9.0", {"triton", "fa3_fwd_interface"}, "bf16", ("fused", "fa3")),
        ("9.0", {"triton", "fa3_fwd_interface"}, "fp16", ("fused", "sdpa")),
        ("8.9", {"triton", "fa3_fwd_interface"}, "bf16", ("fused", "sdpa")),
        ("9.0", {"triton"}, "bf16", ("fused", "sdpa")),
        ("9.0", set(), "bf16", ("torch", "sdpa")),
    ],
)
def test_the_best_kernels_that_are_there_are_taken_where_the_job_leaves_the_choice(
    capability: str, packages: set[str], precision: Any, expected: tuple[str, str]
) -> None:
    gpu = Gpu(name="NVIDIA", total_bytes=80 * 2**30, used_bytes=0, compute_capability=capability)
    machine = Machine(gpus=(gpu,), torch_version="2.11", torch_cuda="13.0", packages=frozenset(packages))
    job = resolve(Job(kernels="auto", attention_kernel="auto", precision=precision), machine).job
    assert (job.kernels, job.attention_kernel) == expected


def test_a_ring_takes_the_attention_that_it_can_join() -> None:
    gpu = Gpu(name="NVIDIA", total_bytes=80 * 2**30, used_bytes=0, compute_capability="9.0")
    machine = Machine(gpus=(gpu, gpu), torch_version="2.11", packages=frozenset({"fa3_fwd_interface"}))
    for knobs, expected in (({"ring_size": 2}, "sdpa"), ({"ulysses_size": 2}, "fa3")):
        found = resolve(Job(precision="bf16", attention_kernel="auto").replace(**knobs), machine)
        assert (found.job.attention_kernel, found.refusal) == (expected, "")


def test_without_a_gpu_the_plain_kernels_are_taken_and_fused_ones_refused() -> None:
    machine = Machine(packages=frozenset({"triton"}))
    job = resolve(Job(kernels="auto", attention_kernel="auto", device="cpu"), machine).job
    assert (job.kernels, job.attention_kernel) == ("torch", "sdpa")
    estimated = resolve(Job(kernels="auto", attention_kernel="auto"), machine).job
    assert (estimated.kernels, estimated.attention_kernel) == ("fused", "sdpa")
    fa3 = Job(attention_kernel="fa3", precision="bf16", mode="estimate")
    assert resolve(fa3, machine).refusal == ""
    assert "needs a Hopper GPU" in resolve(fa3.replace(card="RTX4090-24GB"), machine).refusal
    assert "choose kernels=torch" in resolve(Job(kernels="fused", device="cpu"), machine).refusal
    assert "was not compared with measured runs" in resolve(Job(linear_format="fp8_weights"), machine).refusal


@pytest.mark.parametrize(
    ("machine", "knobs"),
    [
        (TWO_GPUS, {"ulysses_size": 2, "dit_fsdp": True}),
        (TWO_GPUS, {"cfg_parallel": True}),
        (WORLD_OF_TWO, {"ring_size": 2}),
        (NO_GPU, {"ulysses_size": 2, "ring_size": 2, "device": "cpu"}),
        (Machine(gpus=(H100,), torch_version="2.13.0", world=Place(size=2, local_size=1)), {"ulysses_size": 2}),
    ],
)
def test_as_many_ranks_as_there_are_gpus_can_run_and_on_a_cpu_any_number(
    machine: Machine, knobs: dict[str, Scalar]
) -> None:
    assert resolve(Job().replace(**knobs), machine).refusal == ""


FASTEST_FP8 = Job(kernels="auto", attention_kernel="fa3_fp8", linear_format="fp8", precision="bf16")


@pytest.mark.parametrize(
    ("capability", "changes", "words"),
    [
        ("9.0", {}, ""),
        ("8.9", {"attention_kernel": "sdpa"}, ""),
        ("8.9", {}, "attention_kernel=fa3_fp8 needs a Hopper GPU, and this one has compute capability 8.9"),
        ("8.0", {"attention_kernel": "sdpa"}, "linear_format=fp8 needs a GPU of compute capability 8.9 or higher"),
        ("8.0", {"attention_kernel": "sdpa", "linear_format": "fp8_weights"}, ""),
        ("9.0", {"precision": "fp16", "attention_kernel": "sdpa"}, "linear_format=fp8 gives sums in bf16"),
        ("9.0", {"kernels": "torch"}, "choose kernels=fused, or linear_format=fp8_weights"),
    ],
)
def test_eight_bits_are_refused_where_the_gpu_cannot_multiply_them(
    capability: str, changes: dict[str, Scalar], words: str
) -> None:
    gpu = Gpu(name="NVIDIA", total_bytes=80 * 2**30, used_bytes=0, compute_capability=capability)
    packages = frozenset({"triton", "fa3_fwd_interface"})
    machine = Machine(gpus=(gpu,), torch_version="2.11", torch_cuda="13.0", packages=packages)
    refusal = resolve(FASTEST_FP8.replace(**changes), machine).refusal
    assert words in refusal
    assert bool(words) == bool(refusal)


@pytest.mark.parametrize(
    ("asked", "gib"),
    [
        ({"model": "t2v-1.3B"}, 1.0),
        ({"model": "t2v-1.3B", "vae_precision": "bf16"}, 0.69),
        # The residual in float32, keys and values in half precision: 8 bytes x 75,600 tokens x 5,120.
        ({"model": "t2v-14B", "size": "1280*720", "vae_precision": "bf16"}, 2.88),
        ({"model": "t2v-14B", "size": "1280*720", "ulysses_size": 2, "vae_precision": "bf16"}, 1.44),
        ({"model": "t2v-14B", "size": "1280*720", "precision": "fp32"}, 4.33),
    ],
)
def test_a_budget_of_the_vae_that_is_left_open_follows_what_denoising_takes(asked: dict[str, Any], gib: float) -> None:
    job = resolve(Job(vae_budget_gib="auto", mode="estimate", card="H100-80GB", **asked), ONE_GPU).job
    assert job.vae_budget_gib == gib
    assert resolve(Job(vae_budget_gib=0.7), ONE_GPU).job.vae_budget_gib == 0.7
    assert resolve(Job(), ONE_GPU).job.vae_budget_gib is None
