"""Which caption an example gets, and all those that a run can ask for."""

from collections.abc import Iterable
from dataclasses import dataclass

from limner import rng
from limner.config.schema import DataSettings
from limner.data.index import Entry


@dataclass(frozen=True)
class Captions:
    """The captions of a run's records."""

    data: DataSettings
    seed: int

    def draw(self, entry: Entry, position: int) -> tuple[str, bool]:
        """Choose the caption of the example at ``position`` in the stream.

        Returns:
            The caption, and whether it is left out; it is empty then.
        """
        choice = rng.uniform(self.seed, "caption", position)
        caption = entry.captions[int(choice * len(entry.captions))]
        share = self.data.drop_caption
        dropped = share > 0 and rng.uniform(self.seed, "drop", position) < share
        return "" if dropped else caption, dropped

    def list_variants(self, entries: Iterable[Entry]) -> list[str]:
        """Return all captions that examples of these records can have, each once."""
        captions = [caption for entry in entries for caption in entry.captions]
        if self.data.drop_caption:
            captions.append("")
        return list(dict.fromkeys(captions))
