"""Bytes of collective operations, as the text of a compiled program gives them."""

from benchmarks import communication
from benchmarks.communication import Collective, collectives

TEXT = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %all-reduce.1 = (f32[12]{0}, bf16[3,3]{1,0}, /*index=2*/pred[]) all-reduce(%a, %b, %c), channel_id=1, to_apply=%add
  %all-reduce.2 = f32[6,5]{1,0:T(8,128)} all-reduce(%d), channel_id=2, metadata={op_name="all-gather("}
  %all-gather-start.1 = (s32[2]{0}, s32[16]{0}) all-gather-start(%e), dimensions={0}
  ROOT %all-gather-done.1 = s32[16]{0} all-gather-done(%all-gather-start.1)
  %fusion = f32[100]{0} fusion(%all-reduce.2), calls=%c
}
"""


def test_every_collective_is_counted_once_with_the_bytes_of_its_results():
    assert collectives(TEXT) == {
        "all-reduce": Collective(operations=2, arrays=4, bytes=48 + 18 + 1 + 120),
        "all-gather": Collective(operations=1, arrays=1, bytes=64),
    }


def test_too_few_devices_are_named_with_the_remedy(capsys, tmp_path):
    assert communication.main(["--devices", "512", "--output", str(tmp_path / "none")]) == 2
    assert "--xla_force_host_platform_device_count=512" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
