"""Before training: every image that the data uses is opened once, and rows with bad ones are named or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from glm_edge_ft.data.dataset import EncodedDataset
from glm_edge_ft.data.images import BAD_IMAGE_FIX, find_bad_images
from glm_edge_ft.data.prompts import PromptSample
from glm_edge_ft.data.rows import limit_problems
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
        paths = [path for dataset in datasets.values() for _, path in _images_of(dataset)]
        self._open(paths)
        return {path: reason for path in paths if (reason := self._reasons[path]) is not None}

    def take_over(self, datasets: Mapping[str, EncodedDataset], bad: Mapping[str, str]) -> None:
        """Take what another process found in the same data sets (`find_bad`), and open none of their images."""
        for dataset in datasets.values():
            self._reasons.update({path: bad.get(path) for _, path in _images_of(dataset)})

    def of_datasets(self, datasets: Mapping[str, EncodedDataset]) -> tuple[dict[str, EncodedDataset], list[str]]:
        """Return the data sets, by split, without the rows that have bad images, and notices for the user.

        Raises:
            UserError: with `error`, every row that uses a bad image, 20 of them and a count; with `skip`, a data set of
                which no row is left.
        """
        self.find_bad(datasets)
        if self.on_bad_image == "error":
            self._raise((data.place(index), path) for data in datasets.values() for index, path in _images_of(data))
        checked, notices = dict(datasets), []
        for split, dataset in datasets.items():
            bad: dict[int, str] = {}
            for index, path in _images_of(dataset):
                if self._reasons[path] is not None:
                    bad.setdefault(index, f"image {shorten(path)}: {self._reasons[path]}")
            if bad and len(bad) == len(dataset):
                places = [f"{dataset.place(index)}: {reason}" for index, reason in list(bad.items())[:3]]
                what = f"all {len(bad)} rows have bad images: none is left"
                raise UserError.single(split, what, "first of them: " + "; ".join(places))
            if bad:
                checked[split] = dataset.without(bad)
                notices.append(f"{split}: {len(bad)} rows with bad images are left out (on_bad_image: skip)")
        return checked, notices

    def problems_of(self, dataset: EncodedDataset, others: Sequence[tuple[str, str]] = ()) -> list[Problem]:
        """Return a problem for each bad image of each row; none where such rows are left out.

        `others` are images of rows that are wrong themselves: `file:line` and path.
        """
        if self.on_bad_image == "skip":
            return []
        uses = [(dataset.place(index), path) for index, path in _images_of(dataset)]
        return self._problems([*uses, *others])

    def of_prompts(self, samples: Sequence[PromptSample]) -> tuple[list[PromptSample], list[str]]:
        """Do for evaluation samples what `of_datasets` does for rows; none may be left."""
        self._open(path for sample in samples for path in sample.images)
        if self.on_bad_image == "error":
            self._raise((f"{sample.file}:{sample.line}", path) for sample in samples for path in sample.images)
        good = [sample for sample in samples if all(self._reasons[path] is None for path in sample.images)]
        left_out = len(samples) - len(good)
        notice = f"{left_out} evaluation samples with bad images are left out (on_bad_image: skip)"
        return good, [notice] if left_out else []

    def _open(self, paths: Iterable[str]) -> None:
        new = dict.fromkeys(path for path in paths if path not in self._reasons)
        if new:
            self._reasons.update({**new, **find_bad_images(new, self.progress)})

    def _problems(self, uses: Sequence[tuple[str, str]]) -> list[Problem]:
        self._open(path for _, path in uses)
        bad = [(place, path, reason) for place, path in uses if (reason := self._reasons[path]) is not None]
        return [Problem(place, f"image {shorten(path)}: {reason}", BAD_IMAGE_FIX) for place, path, reason in bad]

    def _raise(self, uses: Iterable[tuple[str, str]]) -> None:
        if problems := self._problems(list(uses)):
            raise UserError(limit_problems(problems, "rows with bad images"))


def _images_of(dataset: EncodedDataset) -> Iterator[tuple[int, str]]:
    """Yield each image of a data set with the index of its row."""
    if dataset.has_images:
        yield from ((index, path) for index in range(len(dataset)) for path in dataset.images(index))
