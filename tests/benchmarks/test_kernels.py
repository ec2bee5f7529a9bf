"""What is read from compiled kernels, and floors against sums made by hand."""

import pytest
import torch

from benchmarks import compiled, kernels, wheels
from stanford_alpaca.errors import UserError

SASS = """
        /*0000*/                   S2R R0, SR_CTAID.X ;      /* 0x1 */
                                                             /* 0x2 */
        /*0010*/                   LDG.E.128 R4, [R2] ;      /* 0x1 */
        /*0020*/                   MUFU.EX2 R5, R4 ;         /* 0x1 */
        /*0030*/              @!P0 LDG.E R6, [R2] ;          /* 0x1 */
        /*0040*/               @P1 BRA 0x10 ;                /* 0x1 */
        /*0050*/                   EXIT ;                    /* 0x1 */
        /*0060*/                   BRA 0x60;                 /* 0x1 */
"""
CODES = [
    compiled.Code("statistics", 64, 0, 3, 3, 25.0, 2.0, 8),
    compiled.Code("gradient", 32, 0, 3, 11, 27.0, 2.0, 8),
]


def test_the_main_loop_is_what_the_longest_branch_backwards_spans():
    assert compiled.main_loop(SASS) == ["LDG.E.128", "MUFU.EX2", "LDG.E", "BRA"]


def test_compiled_kernels_load_16_bytes_and_spill_nothing():
    pytest.importorskip("triton", reason="triton is not installed")
    for costs, loads in (("", 1), ("float32", 3), ("bfloat16", 2)):
        for code in compiled.compiled_code(90, 2048, 8, costs=costs):
            assert (code.wide, code.spilled) == (loads, 0)  # 8 logits, and 8 costs
            assert code.exps == (2 if costs else 1)
            assert code.resident >= 32
    odd = compiled.compiled_code(90, 2048, 8, vocab=65)
    assert [code.wide for code in odd] == [0, 0]


def test_warps_that_fit():
    assert [code.resident for code in CODES] == [32, 64]  # 65536 / (64 * 32 * 8) = 4 blocks of 8


def test_floors(monkeypatch):
    monkeypatch.setattr(kernels, "unique_targets", lambda vocab: 1000)
    gpu = kernels.Gpu("H100", 90, 1e12, 1e13, 1e15)
    hidden, vocab = 1024, 2**17  # 2^28 / V = 2048 tokens: 4 chunks
    stages = kernels.our_stages(gpu, hidden, vocab, "frozen", CODES)
    logits, head = 8192 * vocab, hidden * vocab
    assert stages == pytest.approx(
        {
            "products": 6 * 8192 * head / 989e12,
            "statistics": (2 * logits + 4000 * vocab) / 1e12,
            "gradient": (4 * logits + 4000 * vocab) / 1e12,
            "sum of d weight": (4 + 48 + 6 + 4) * head / 1e12,
            "costs": 2 * 1000 * head / 1e13,
        }
    )
    slow = kernels.Gpu("H100", 90, 1e15, 1e13, 1e12)  # instructions are the longest there
    assert kernels.our_stages(slow, hidden, vocab, "mle", CODES)["gradient"] == pytest.approx(
        27 * logits / 1e12
    )
    assert kernels.expected({"a": 0.004, "b": 0.004}) == pytest.approx(10)


def test_operations_of_a_chunk_are_counted_and_views_are_not():
    with kernels.Counted() as counted:
        x = torch.ones(4)
        (x.view(2, 2) * 2)[0].sum()
    assert counted.count == 3  # ones, mul, sum


def test_wheels_that_do_not_fit_are_left_out(tmp_path, monkeypatch, capsys):
    sizes = {"a": 3, "b": 2, "c": 1}

    def download(requirement, folder, options):
        if requirement == "d":
            return "no such package"
        wheel = folder / f"{requirement}-1-none-any.whl"
        wheel.write_bytes(bytes(sizes[requirement] * 2**20))
        return wheel

    monkeypatch.setattr(wheels, "download", download)
    monkeypatch.setattr(wheels, "WANTED", (("x", ("a", "b", "d")), ("y", ("c",))))
    wheels.run(str(tmp_path / "new"), limit_mib=4)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "a-1-none-any.whl",
        "c-1-none-any.whl",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "  3.00 MiB  a-1-none-any.whl  (x)",
        "left out: b-1-none-any.whl (x): 2.0 MiB do not fit",
        "left out: d (x): no such package",
        "  1.00 MiB  c-1-none-any.whl  (y)",
        f"  4.00 MiB of 4 in {tmp_path / 'new'}",
    ]
    with pytest.raises(UserError, match="is not empty: give a new folder"):
        wheels.run(str(tmp_path / "new"))
