import numpy as np
import pytest

from h1r_rl.grpo.advantages import batch_std, group_advantages, has_signal

NAN = float("nan")
SCORES = np.array([1.0, 0.0, NAN, 0.5, 0.0])
JUDGED = [1.0, 0.0, 0.5, 0.0]


def test_formulas_leave_out_samples_without_a_verdict():
    mean = sum(JUDGED) / 4
    std = (sum((r - mean) ** 2 for r in JUDGED) / 4) ** 0.5
    expected = {
        "grpo": [(r - mean) / (std + 1e-6) for r in JUDGED],
        "dr_grpo": [r - mean for r in JUDGED],
        "rloo": [r - (sum(JUDGED) - r) / 3 for r in JUDGED],
    }
    for kind, values in expected.items():
        found = group_advantages(SCORES, kind)
        assert found[2] == 0
        np.testing.assert_allclose(np.delete(found, 2), values, rtol=1e-12)


def test_batch_std_divides_every_group():
    groups = [SCORES, np.array([0.2, 0.4])]
    centred = [r - np.mean(JUDGED) for r in JUDGED] + [-0.1, 0.1]
    std = batch_std([*groups, np.array([1.0]), np.array([NAN, 0.0])])  # the last two have no part
    assert std == pytest.approx((sum(c * c for c in centred) / 6) ** 0.5)
    np.testing.assert_allclose(
        group_advantages(groups[1], std=std), np.array([-0.1, 0.1]) / (std + 1e-6)
    )


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("scores", [[1.0, 1.0, NAN], [NAN, 0.3], [NAN, NAN]])
def test_no_signal_is_no_advantage(kind, scores):
    assert not has_signal(np.array(scores))
    assert not group_advantages(np.array(scores), kind).any()


def test_signal():
    assert has_signal(SCORES)
