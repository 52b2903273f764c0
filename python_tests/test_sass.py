"""benchmarks/sass.py: its readers on short texts, and the rules on the library that was built."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks/sass.py").exists():
    pytest.skip("needs the source tree, for benchmarks/sass.py", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import sass  # noqa: E402

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7gankern4fooE:
  REG:32 STACK:8 SHARED:5124 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function bar:
  REG:255 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# A loop in a loop, each with a 32-bit division; a 64-bit division before them; a spill.
DISASSEMBLY = """
	.section	.text.foo,"ax",@progbits
.text.foo:
        .type           foo,@function
foo:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64) ;
        /*0020*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm3x_div_rn_f32) ;
.L_x_0:
        /*0030*/                   I2F.U32.RP R0, UR18 ;
.L_x_1:
        /*0040*/              @!P0 LDG.E.128 R4, desc[UR14][R8.64] ;
        /*0050*/               @P0 LDG.E.U16.CONSTANT R4, desc[UR14][R8.64] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0070*/                   I2F.RP R0, R5 ;
        /*0080*/                   STG.E.64 desc[UR14][R8.64], R4 ;
        /*0090*/                   STL.64 [R1], R4 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/              @!P2 BRA `(.L_x_0) ;
        /*00c0*/                   LDL.LU.64 R4, [R1] ;
        /*00d0*/                   EXIT ;
.L_x_2:
        /*00e0*/                   BRA `(.L_x_2);
$__internal_0_$__cuda_sm20_rem_s64:
        /*00f0*/                   I2F.U64.RP R0, R2 ;
        /*0100*/                   RET.REL.NODEC R4 `(foo) ;
	.section	.text.bar,"ax",@progbits
.text.bar:
        /*0000*/                   EXIT ;
"""


def kernel(**changes) -> sass.Kernel:
    given = {"source": "op", "name": "op_kernel<float, 4>", "arch": "sm_90", "registers": 32}
    given |= {"stack": 0, "shared": 0, "threads": 256, "code": sass.Code()}
    made = sass.Kernel(**given | changes)
    if made.code and "code" not in changes:
        made.code.loads[16] = made.code.stores[16] = 1
    return made


def test_reads_resources():
    used = sass.resources(RESOURCES)
    assert used["_ZN7gankern4fooE"] == {"REG": 32, "STACK": 8, "SHARED": 5124, "LOCAL": 0}
    assert used["bar"]["REG"] == 255


def test_reads_code():
    bodies = dict(sass.functions(DISASSEMBLY))
    assert list(bodies) == ["foo", "bar"]
    code = sass.read_code(bodies["foo"])
    assert code.loads == {16: 2, 2: 1}
    assert code.stores == {8: 1}
    assert code.spills == {"STL": 1, "LDL": 1}
    assert (code.divisions, code.loop_divisions) == (3, 1)
    assert code.instructions == 17
    # 17 for 42 bytes, 9 of the outer loop, 7 of the inner one.
    assert code.loop_density == code.density == 7 / 42


def test_reads_launch_bounds():
    info = struct.pack("<BBH", 3, 25, 96) + struct.pack("<BBHIII", 4, 5, 12, 32, 8, 1)
    assert sass.max_threads(info) == 256
    assert sass.max_threads(info[:4]) == 0


def test_names():
    mangled = "_ZN7gankern44_GLOBAL__N__601e13fc_11_bias_act_cu_33420bae22bias_act_planes_kernel"
    assert sass.source_of(mangled) == "bias_act"
    space = "gankern::(anonymous namespace)::"
    plain = f"void {space}rows_kernel<{space}Forward<{space}Half16>, 8, 1>(T<int>)"
    assert sass.short_name(plain) == "rows_kernel<Forward<Half16>, 8, 1>"
    assert sass.pack_bytes("rows_kernel<Forward<Half16>, 8, 1>") == 16
    assert sass.pack_bytes("bias_act_rows_kernel<1, true, float, 1>") == 4
    assert sass.pack_bytes("upfirdn2d_any_kernel<double>") == 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "expected"),
    [
        ("sm_80", 32, 0, 256, 1.0),
        ("sm_80", 33, 0, 256, 0.75),
        ("sm_90", 64, 0, 1024, 0.5),
        ("sm_90", 65, 0, 1024, 0.0),
        ("sm_86", 32, 0, 1024, 2 / 3),
        ("sm_80", 32, 40 * 1024, 256, 0.5),
        ("sm_75", 64, 0, 256, 1.0),
    ],
)
def test_occupancy(arch, registers, shared, threads, expected):
    assert sass.occupancy(arch, registers, shared, threads) == pytest.approx(expected)


def test_rules():
    assert sass.check([kernel()], {}) == []
    spilling = kernel(stack=8)
    spilling.code.spills["STL"] = 1
    assert len(sass.check([spilling], {})) == 2
    assert "occupancy 25%" in sass.check([kernel(registers=128)], {})[0]
    assert "no 128-bit global loads" in sass.check([kernel(code=sass.Code())], {})[0]
    dividing = kernel()
    dividing.code.loop_divisions = 2
    assert "2 integer divisions" in sass.check([dividing], {})[0]
    assert "not in the budget" in sass.check([kernel()], {"op: other": {}})[0]


def test_local_memory_in_ptx():
    ptx = ".visible .entry foo(\n.param .u32 n\n)\n{\n\t.local .align 16 .b8 depot[16];\n}\n"
    assert sass.local_memory(ptx + ".visible .entry bar()\n{\n\tret;\n}\n") == ["foo"]


def test_budget():
    kept = {"op: op_kernel<float, 4>": {"sm_90": sass.figures(kernel())}}
    assert sass.check([kernel(registers=30)], kept) == []
    (found,) = sass.check([kernel(registers=48)], kept)[:1]
    assert found == "op: op_kernel<float, 4> sm_90: registers: 48, the budget has 32"
    looping = kernel()
    looping.code.loop_divisions = 2
    assert "integer divisions in innermost loops: 2" in sass.check([looping], kept)[-1]


def test_built_library():
    if not (ROOT / "gankern/_cuda.so").exists():
        pytest.skip("gankern/_cuda.so is not built: no nvcc, or a CPU build of torch")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    command = [sys.executable, str(ROOT / "benchmarks/sass.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr
