"""Progress over long work: a bar in a terminal, a plain line every few seconds elsewhere."""

import sys

from tqdm import tqdm

from mixtral_ms.log import rank_from_environment

_PLAIN_INTERVAL_S = 10.0


def progress_bar(total: float | None, description: str, unit: str, scale: bool = False) -> tqdm:
    """A tqdm bar; without a terminal it prints one line every ten seconds instead.

    Of the processes of a run the first one shows it.

    Args:
        total: amount of work in `unit`s, None when unknown.
        description: what is being done.
        unit: name of one unit of work, for example "B" for bytes.
        scale: show the numbers with SI prefixes (k, M, G).
    """
    terminal = sys.stderr.isatty()
    return (tqdm if terminal else _Lines)(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=scale,
        mininterval=0.2 if terminal else _PLAIN_INTERVAL_S,
        delay=0 if terminal else 5.0,
        ascii=not terminal,
        disable=rank_from_environment() > 0,
        file=sys.stderr if terminal else _LineWriter(),
    )


class _Lines(tqdm):
    """A bar whose every line says something new: closing it does not repeat the last one."""

    _shown: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n != self._shown:
            self._shown = self.n
            super().display(msg, pos)


class _LineWriter:
    """Turns tqdm's carriage-return updates into whole lines."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
