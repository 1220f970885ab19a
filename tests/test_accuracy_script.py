"""scripts/accuracy.py: npbn's float32 next to PyTorch's."""

from __future__ import annotations

from commands import assert_refused, run


def test_batch_norm_is_no_less_accurate_than_pytorch_on_hard_inputs(tmp_path):
    """dbeta is the sum of dy, for which it does not matter how hard x is."""
    process = run("accuracy.py", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    hard = 0
    name = ""
    for line in process.stdout.splitlines()[4:]:
        first, result, *errors = (cell.strip() for cell in line.split("|")[1:-1])
        npbn, pytorch = (float(error.replace(",", "")) for error in errors)
        name = first or name
        # Sums of up to 4,096 terms are added one after the other; their roundings are as many
        # steps to either side at random, so that about √4096 units remain.
        assert npbn <= 64, line
        if ("mean" in name or "constant" in name) and result != "dbeta":
            assert npbn <= pytorch, (name, line)
            hard += 1
    assert hard == 5 * 3


def test_bad_options_are_refused_in_one_line(tmp_path):
    assert_refused(run("accuracy.py", "--no-such-option", cwd=tmp_path), "accuracy.py: error:")
