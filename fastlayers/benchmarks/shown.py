"""How a case looks on the terminal."""

from fastlayers.benchmarks.runner import ratio


def as_text(case, results, problem):
    """The lines that show one case; problem: why it could not be set up, or None."""
    lines = [f"{case.suite}: {case.name}"]
    if problem:
        return [*lines, f"  not run: {problem}"]
    shown = [result for result in results if not result.skipped]
    width = max(len(result.candidate) for result in shown) + 2 if shown else 0
    lines += [_line(case, result, width) for result in shown]
    return lines + [line for result in results if (line := verdict(case, results, result))]


def _line(case, result, width):
    name = f"  {result.candidate:<{width}}"
    if result.problem:
        return f"{name}failed: {result.problem}"
    low, high = result.percentile(20), result.percentile(80)
    text = f"{name}{duration(result.median):>9}  ({duration(low)} .. {duration(high)}, {len(result.seconds)} rounds)"
    text += "".join(f"  {speed}" for speed in _speeds(case, result))
    if result.peak_bytes is not None:
        text += f"  {result.peak_bytes / 1e6:.0f} MB"
    if result.deviation is not None:
        text += f"  deviation {result.deviation:.2f}"
    return text


def verdict(case, results, result):
    """What became of the comparison with this candidate, or of the case's limit; "" where there is none."""
    if case.limit is not None and result.seconds:
        reached = "reached" if result.median <= case.limit else "MISSED"
        return f"  {duration(result.median)}, wanted at most {duration(case.limit)}: {reached}"
    beside = ratio(results[0], result)
    if beside is None:
        return ""
    text = f"  {beside.median:.2f} times the speed of {result.candidate} ({beside.low:.2f} .. {beside.high:.2f})"
    wanted = case.targets.get(result.candidate)
    if wanted is not None:
        text += f", wanted {wanted:g}: {'reached' if beside.median >= wanted else 'MISSED'}"
    return text if beside.verdict == "faster" else f"{text}: {beside.verdict}"


def duration(seconds):
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.4g} {unit}"


def _speeds(case, result):
    if case.flops:
        yield f"{case.flops / result.median / 1e9:.0f} GFLOP/s"
    elif case.bytes:
        yield f"{case.bytes / result.median / 1e9:.1f} GB/s"
    elif case.tokens:
        yield f"{case.tokens / result.median:.0f} tokens/s"


def skipped(all_results):
    """Who took no part, and why, once each: [(candidate, reason, in how many cases)]."""
    found = {}
    for result in all_results:
        if result.skipped:
            key = result.candidate, result.skipped
            found[key] = found.get(key, 0) + 1
    return [(*key, count) for key, count in found.items()]
