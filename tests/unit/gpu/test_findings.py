"""The measuring kit's findings, and kernels by kind."""

import json
from pathlib import Path

import pytest

from tests.gpu.kit.findings import Findings
from tests.gpu.kit.kernel_kinds import Kernel, by_kind, idle_share, kind_lines, kind_of


def test_findings_are_lines_and_json(tmp_path: Path) -> None:
    lines: list[str] = []
    findings = Findings(tmp_path / "results.jsonl", lines.append)
    findings.check(True, "loss", "near")
    findings.figure("copy", "3 TB/s", bytes_per_second=3e12)
    with findings.part("kernel"):
        raise RuntimeError("no\nsuch kernel")
    assert lines == ["OK loss: near", "INFO copy: 3 TB/s", "BAD kernel: RuntimeError: no such kernel"]
    assert findings.num_bad == 1
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [entry["finding"] for entry in entries] == ["OK", "INFO", "BAD"]
    assert entries[1]["bytes_per_second"] == 3e12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("_attention_forward", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_per_fused_add_native_layer_norm_view_2", "compiled elementwise and norms"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_add_7", "compiled elementwise and norms"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "concatenation, copies, casts"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32", "reductions"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_kinds_are_summed_the_largest_first() -> None:
    kernels = [Kernel("softmax_a", 2, 1.0), Kernel("gemm_a", 3, 2.0), Kernel("softmax_b", 1, 2.5)]
    assert list(by_kind(kernels).items()) == [("softmax", 3.5), ("matrix products", 2.0)]
    assert idle_share(kernels, 11.0) == pytest.approx(0.5)
    lines = kind_lines(kernels, 11.0)
    assert lines[0] == "kernels take 5.5 ms in 6 launches; the device is idle 50.0% of the step"
    assert [line.split()[0] for line in lines[1:]] == ["softmax", "matrix"]
