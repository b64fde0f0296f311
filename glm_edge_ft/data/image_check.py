"""Before training: every image that the data uses is opened once, and rows with bad ones are named or left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from glm_edge_ft.data.dataset import EncodedDataset
from glm_edge_ft.data.images import bad_image, find_bad_images, raise_bad_images
from glm_edge_ft.data.prompts import PromptSample
from glm_edge_ft.errors import Problem, UserError, shorten


class ImageCheck:
    """Checks the images of encoded data sets and of evaluation samples; opens none of them twice."""

    def __init__(self, on_bad_image: Literal["error", "skip"] = "error", progress: bool = True) -> None:
        """Say what happens to rows with bad images, and whether a bar on stderr shows how far it is."""
        self.on_bad_image = on_bad_image
        self.progress = progress
        self._reasons: dict[str, str | None] = {}  # of every image opened so far; None: it is good

    def find_bad(self, datasets: Mapping[str, EncodedDataset]) -> dict[str, str]:
        """Open the images of the data sets; return what is wrong with each bad one."""
        paths = list(_paths(datasets))
        self._open(paths)
        return {path: reason for path in paths if (reason := self._reasons[path]) is not None}

    def take_over(self, datasets: Mapping[str, EncodedDataset], bad: Mapping[str, str]) -> None:
        """Take what another process found in the same data sets (`find_bad`), and open none of their images."""
        self._reasons.update({path: bad.get(path) for path in _paths(datasets)})

    def of_datasets(self, datasets: Mapping[str, EncodedDataset]) -> tuple[dict[str, EncodedDataset], list[str]]:
        """Return the data sets without the rows that have bad images, and notices for the user.

        Args:
            datasets: by split; those of chat data stay as they are.

        Raises:
            UserError: with `error`, every row that uses a bad image, 20 of them and a count; with `skip`, a data set of
                which no row is left.
        """
        vision = {split: dataset for split, dataset in datasets.items() if dataset.has_images}
        self._open(_paths(vision))
        bad_rows = {split: self._bad_rows(dataset) for split, dataset in vision.items()}
        if self.on_bad_image == "error":
            self._raise((vision[split].place(index), path) for split, rows in bad_rows.items() for index, path in rows)
        checked, notices = dict(datasets), []
        for split, rows in bad_rows.items():
            if not rows:
                continue
            reasons = {index: f"image {shorten(path)}: {self._reasons[path]}" for index, path in reversed(rows)}
            if len(reasons) == len(vision[split]):
                what = f"all {len(reasons)} rows have bad images: none is left"
                places = [f"{vision[split].place(index)}: {reasons[index]}" for index in sorted(reasons)[:3]]
                raise UserError.single(split, what, "first of them: " + "; ".join(places))
            checked[split] = vision[split].without(dict(sorted(reasons.items())))
            notices.append(f"{split}: {len(reasons)} rows with bad images are left out (on_bad_image: skip)")
        return checked, notices

    def problems_of(self, dataset: EncodedDataset, others: Sequence[tuple[str, str]] = ()) -> list[Problem]:
        """Return a problem for each bad image of each row; none where such rows are left out.

        `others` are images of rows that are wrong themselves: `file:line` and path.
        """
        if self.on_bad_image == "skip":
            return []
        self._open(itertools.chain(_paths({"": dataset}), (path for _, path in others)))
        places = [(dataset.place(index), path) for index, path in self._bad_rows(dataset)]
        places += [(place, path) for place, path in others if self._reasons[path] is not None]
        return [bad_image(place, path, self._reasons[path] or "") for place, path in places]

    def of_prompts(self, samples: Sequence[PromptSample]) -> tuple[list[PromptSample], list[str]]:
        """Return the evaluation samples without those that have bad images, and notices for the user.

        Raises:
            UserError: with `error`, every sample that uses a bad image, 20 of them and a count.
        """
        self._open(path for sample in samples for path in sample.images)
        bad = [(sample, path) for sample in samples for path in sample.images if self._reasons[path] is not None]
        if not bad:
            return list(samples), []
        if self.on_bad_image == "error":
            self._raise((f"{sample.file}:{sample.line}", path) for sample, path in bad)
        left_out = {id(sample) for sample, _ in bad}
        notice = f"{len(left_out)} evaluation samples with bad images are left out (on_bad_image: skip)"
        return [sample for sample in samples if id(sample) not in left_out], [notice]

    def _open(self, paths: Iterable[str]) -> None:
        new = dict.fromkeys(path for path in paths if path not in self._reasons)
        if new:
            self._reasons.update(new)
            self._reasons.update(find_bad_images(new, self.progress))

    def _bad_rows(self, dataset: EncodedDataset) -> list[tuple[int, str]]:
        return [
            (index, path)
            for index in range(len(dataset))
            for path in dataset.images(index)
            if self._reasons[path] is not None
        ]

    def _raise(self, found: Iterable[tuple[str, str]]) -> None:
        places: dict[str, list[str]] = {}
        for place, path in found:
            places.setdefault(path, []).append(place)
        raise_bad_images(places, {path: self._reasons[path] or "" for path in places})


def _paths(datasets: Mapping[str, EncodedDataset]) -> Iterator[str]:
    for dataset in datasets.values():
        if dataset.has_images:
            yield from (path for index in range(len(dataset)) for path in dataset.images(index))
