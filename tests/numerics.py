"""assert_accurate: the only tolerance in the tests. The rule itself stands in fastlayers/agreement.py."""

from fastlayers.agreement import deviation


def assert_accurate(ours, exact, eager, what="result"):
    """Assert the rule for one tensor: `exact` is float64, `eager` plain torch in the tested dtype."""
    found = deviation(ours, exact, eager)
    assert found.ok, f"{what}: {found.problem}"
