"""The progress bar, advanced by the host between chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, warmup: int) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` steps, shown on a terminal only; yields ``update(steps)``."""
    from tqdm.auto import tqdm  # here, for it costs a twentieth of a second

    with tqdm(total=total, unit="step", unit_scale=True, disable=None, leave=True) as bar:

        def update(steps: int) -> None:
            bar.update(steps)
            bar.set_description("warmup" if bar.n < warmup else "sample", refresh=False)

        bar.set_description("compile")
        yield update
