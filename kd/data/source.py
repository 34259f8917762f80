"""The data sets a config can name: where their files are, what they contain, how they become splits.

Each class is the ``_target_`` of one file in ``conf/data/``; its fields are what is hashed. Nothing here imports torch
before images are loaded, because a plan needs only `Source.content_digest`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from kd.data import cache as kept
from kd.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kd.data.readers import Blob, Header
    from kd.data.split import Split, Splits

T = TypeVar("T")
AUGMENTS = ("none", "shift", "crop_flip", "resized_crop_flip")  # the functions of kd/data/augment.py
DIGESTS = "digests.json"  # inside the cache folder
MEMORY = 2 * 1024**3
PATIENCE = 10.0  # seconds for a server to answer
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What all data sets have in common.

    Args:
        name: what it is called in tables.
        version: of the way the files become samples; the code refuses another one than its own.
        num_classes: how many classes.
        channels: 1 or 3.
        size: side in pixels of what a network is given.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        validation: samples taken out of train, drawn by class: a number of them, or a fraction below 1.
        split_seed: what the draw depends on, beside the samples' ids.
        augment: one of `AUGMENTS`, for training views.
        digest: the content's sha256 once it is known; it is what makes a key depend on the files.

    Fields that a subclass allows to be null are found from the files by `resolved`.

    Raises:
        InputError: at a value out of range.
    """

    name: str
    version: int
    num_classes: int
    channels: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    validation: float
    split_seed: int = 0
    augment: str = "none"
    digest: str | None = None

    VERSION: ClassVar[int] = 1
    NATIVE: ClassVar[tuple[int, int, int] | None] = None  # classes, channels and side, where the set fixes them
    TORCHVISION: ClassVar[str | None] = None  # the class that can download it
    WHERE: ClassVar[str] = ""  # what is looked for under the root

    def __post_init__(self) -> None:
        """Check each value that needs no file."""
        if self.version != self.VERSION:
            raise InputError(
                f"data.version={self.version}: this code reads version {self.VERSION} of {self.name}; "
                "use the code that wrote this config"
            )
        if self.augment not in AUGMENTS:
            near = nearest(str(self.augment), AUGMENTS)
            raise InputError(f"data.augment={self.augment!r} is none of {', '.join(AUGMENTS)}{near}")
        count = self.validation
        if not _number(count) or not (0 <= count < 1 or (count >= 1 and float(count).is_integer())):
            raise InputError(f"data.validation={count!r}: give a whole number of samples or a fraction below 1")
        if not _number(self.split_seed) or not float(self.split_seed).is_integer():
            raise InputError(f"data.split_seed={self.split_seed!r}: give a whole number")
        if self.NATIVE is not None:
            classes, channels, side = self.NATIVE
            for field, value in (("num_classes", classes), ("channels", channels)):
                if getattr(self, field) != value:
                    raise InputError(f"data.{field}={getattr(self, field)}: {self.name} has {value}; leave it at that")
            if not _number(self.size) or self.size < side:
                raise InputError(
                    f"data.size={self.size}: the images of {self.name} have {side} pixels; give {side} or more"
                )
        # What is null here is found from the files, and fixed sets have nothing to find.
        if self.size is not None and not (_number(self.size) and self.size >= 1 and float(self.size).is_integer()):
            raise InputError(f"data.size={self.size!r}: give the side of the images in pixels")
        if self.channels not in (None, 1, 3):
            raise InputError(f"data.channels={self.channels!r}: images have 1 (grey) or 3")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if values is None and self.NATIVE is None:
                continue
            if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(_number, values)):
                raise InputError(f"data.{field}={values!r}: give a list of numbers, one a channel")
            if self.channels is not None and len(values) != self.channels:
                raise InputError(f"data.{field} has {len(values)} numbers for {self.channels} channels; give one each")
            if field == "std" and min(values) <= 0:
                raise InputError(f"data.std={list(values)}: each must be greater than 0")

    @property
    def deterministic(self) -> bool:
        """Whether a sample looks the same in every epoch, so that a teacher's logits on it can be stored."""
        return self.augment == "none"

    def files(self, root: Path) -> list[Path]:
        """The files the set consists of, downloaded first if they are absent and can be.

        Args:
            root: the folder that holds the data sets.

        Raises:
            InputError: if they are not there; the line says what was looked for, where, and why no download mended it.
        """
        root = _folder(root)
        found = self._find(root)
        if not found:
            self._download(root)
            found = self._find(root)
        if not found:
            raise InputError(self._missing(root))
        return found

    def content_digest(self, root: Path, cache: Path) -> str:
        """The sha256 over each file's relative name and content: what the data are, wherever they lie.

        Args:
            root: the folder that holds the data sets.
            cache: the JSON file that keeps the digests of single files, so that each is read once.

        Raises:
            InputError: if files are missing or cannot be read.
        """
        files, base = self.files(root), self._base(_folder(root))
        # A packed file counts as its content, so that mnist is one set with and without .gz.
        names = [file.relative_to(base).as_posix().removesuffix(".gz") for file in files]
        pairs = sorted(zip(names, kept.file_digests(files, cache), strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def resolved(self, root: Path) -> Self:
        """The same set with nothing left null.

        Raises:
            InputError: if what is given does not fit the files.
        """
        return self

    def training_samples(self, root: Path) -> int:
        """How many samples there are to train on, without reading an image.

        Args:
            root: the folder that holds the data sets.

        Raises:
            InputError: if files are missing.
        """
        self.files(root)
        count, own_validation = self._train_count(_folder(root))
        if own_validation:
            return count
        return count - (int(self.validation) if self.validation >= 1 else round(self.validation * count))

    def load(self, root: Path, memory_bytes: int = MEMORY, cache: Path | None = None) -> Splits:
        """Train, validation and test; no sample is in two of them.

        Args:
            root: the folder that holds the data sets.
            memory_bytes: sets of own images that are larger than this when decoded stay in files.
            cache: a folder for images already decoded (None: decoded at every start).

        Raises:
            InputError: if files are missing or damaged, or more validation samples are asked for than there are.
        """
        from kd.data.split import Splits, stratified

        source = self.resolved(root)
        source.files(root)
        parts, classes = source._read(_folder(root), memory_bytes, None if cache is None else _folder(cache))
        if len(classes) != source.num_classes:
            raise InputError(f"data.num_classes={source.num_classes}: {self.name} has {len(classes)} classes")
        train, validation = parts["train"], parts.get("validation")
        if validation is None:
            count = int(self.validation) if self.validation >= 1 else round(self.validation * len(train))
            if count >= len(train):
                raise InputError(f"data.validation={count}: {self.name} has {len(train)} training samples; take fewer")
            taken = stratified(train.ids, train.targets, count, self.split_seed)
            train, validation = train.without(taken), train.subset(taken)
        return Splits(train, validation, parts["test"], classes)

    def _base(self, root: Path) -> Path:
        """The folder that names in the content digest are relative to."""
        return root

    @abstractmethod
    def _find(self, root: Path) -> list[Path]:
        """All files of the set, in a fixed order, or none of them if one is absent."""

    @abstractmethod
    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        """The parts the files have (train and test; validation if there is one of its own) and the class names."""

    @abstractmethod
    def _train_count(self, root: Path) -> tuple[int, bool]:
        """Samples in the files' train part, and whether validation is a part of its own."""

    def _missing(self, root: Path) -> str:
        return f"{self.name}: no {self.WHERE} in {root} (the folder is KD_DATA or run.data_dir)"

    def _download(self, root: Path) -> None:
        """Fetch the files through torchvision into a folder beside their place, then move each in whole."""
        if self.TORCHVISION is None:
            raise InputError(self._missing(root))
        import http.client
        import io
        import tarfile
        import zlib
        from contextlib import redirect_stdout

        try:
            import torchvision

            present = root.is_dir()
            root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=root, prefix=".download-"))
            try:
                with _impatient(), redirect_stdout(io.StringIO()):
                    getattr(torchvision.datasets, self.TORCHVISION)(str(temporary), download=True)
                for file in self._find(temporary):
                    place = root / file.relative_to(temporary)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                if not present:
                    with suppress(OSError):
                        root.rmdir()
        except (
            ImportError,
            OSError,
            RuntimeError,
            EOFError,
            http.client.HTTPException,
            tarfile.TarError,
            zlib.error,
        ) as e:
            cause = next((line.strip() for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
            raise InputError(f"{self._missing(root)}, and it could not be downloaded: {cause}") from e


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 handwritten digits of 8x8 pixels, inside scikit-learn: nothing is downloaded.

    The test set is a fixed fifth, drawn by class; the id of a sample is its row in scikit-learn's set.
    """

    NATIVE = (10, 1, 8)
    WHERE = "sklearn/datasets/data/digits.csv.gz"
    TEST: ClassVar[int] = 360

    def _base(self, root: Path) -> Path:
        spec = find_spec("sklearn")  # finds the package without running it
        return Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else root

    def _find(self, root: Path) -> list[Path]:
        file = self._base(root) / "digits.csv.gz"
        return [file] if file.is_file() else []

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return 1797 - self.TEST, False

    def _missing(self, root: Path) -> str:
        return (
            f"{self.name}: no {self.WHERE} in this Python; install it anew: pip install --force-reinstall scikit-learn"
        )

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        import numpy as np

        from kd.data.split import held, stratified

        (file,) = self._find(root)
        try:
            table = np.loadtxt(file, delimiter=",").astype(np.int64)
            # 0..16 to 0..255, halves up
            images = ((table[:, :-1] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(
                f"{file} is damaged ({error}); install it anew: pip install --force-reinstall scikit-learn"
            ) from error
        whole = held(images, table[:, -1])
        test = stratified(whole.ids, whole.targets, self.TEST, seed=0)
        return {"train": whole.without(test), "test": whole.subset(test)}, tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Made-up images that can be learnt, of any shape and number: what benchmarks run on where no data set is.

    Each class has a pattern of 4x4 patches, each sample its class's pattern under noise; all of it follows from
    ``split_seed``. The id of a sample is its number.

    Args:
        samples: of train and validation together.
        test: of the test set.
    """

    samples: int
    test: int

    def __post_init__(self) -> None:
        """Check the counts too."""
        super().__post_init__()
        for field in ("num_classes", "channels", "size", "samples", "test"):
            value = getattr(self, field)
            if not _number(value) or value < 1 or not float(value).is_integer():
                raise InputError(f"data.{field}={value!r}: give a whole number, 1 or more")

    def files(self, root: Path) -> list[Path]:
        """None: the images are made."""
        return self._find(root)

    def _find(self, root: Path) -> list[Path]:
        return []

    def content_digest(self, root: Path, cache: Path) -> str:
        """Of what the images are made from."""
        words = [self.num_classes, self.channels, self.size, self.samples, self.test, self.split_seed]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return int(self.samples), False

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        import numpy as np

        from kd.data.split import held

        shape = (int(self.num_classes), int(self.channels), 4, 4)
        # Philox: its numbers are the same in every version and on every machine.
        patterns = np.random.Generator(np.random.Philox(key=[int(self.split_seed), 0])).random(shape)
        parts, first = {}, 0
        for number, (part, count) in enumerate((("train", int(self.samples)), ("test", int(self.test)))):
            draw = np.random.Generator(np.random.Philox(key=[int(self.split_seed), number + 1]))
            ids = np.arange(first, first + count, dtype=np.int64)
            targets = ids % shape[0]
            scale = -(-int(self.size) // 4)
            images = patterns[targets].repeat(scale, axis=2).repeat(scale, axis=3)[..., : self.size, : self.size]
            noise = draw.random((count, shape[1], int(self.size), int(self.size)), dtype=np.float32)
            parts[part] = held(((images + noise) * 127.5).astype(np.uint8), targets, ids)
            first += count
        return parts, tuple(str(i) for i in range(shape[0]))


@dataclass(frozen=True, kw_only=True)
class MNIST(Source):
    """60,000 and 10,000 handwritten digits, 28x28 grey, in the IDX files of ``MNIST/raw``, plain or ``.gz``.

    Source: http://yann.lecun.com/exdb/mnist/.
    """

    NATIVE = (10, 1, 28)
    TORCHVISION = "MNIST"
    WHERE = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
    CLASSES: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def _base(self, root: Path) -> Path:
        return root / "MNIST" / "raw"

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return _idx_count(self._find(root)[0]), False

    def _find(self, root: Path) -> list[Path]:
        return _idx_files(self._base(root))

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        return _idx(self._find(root)), self.CLASSES


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Source):
    """60,000 and 10,000 pieces of clothing in MNIST's format, in ``FashionMNIST/raw``.

    Source: https://github.com/zalandoresearch/fashion-mnist.
    """

    NATIVE = (10, 1, 28)
    TORCHVISION = "FashionMNIST"
    WHERE = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
    CLASSES: ClassVar[tuple[str, ...]] = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )

    def _base(self, root: Path) -> Path:
        return root / "FashionMNIST" / "raw"

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return _idx_count(self._find(root)[0]), False

    def _find(self, root: Path) -> list[Path]:
        return _idx_files(self._base(root))

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        return _idx(self._find(root)), self.CLASSES


@dataclass(frozen=True, kw_only=True)
class CIFAR10(Source):
    """50,000 and 10,000 colour images of 32x32 pixels in 10 classes, in ``cifar-10-batches-py``.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    NATIVE = (10, 3, 32)
    TORCHVISION = "CIFAR10"
    WHERE = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"

    def _base(self, root: Path) -> Path:
        return root / "cifar-10-batches-py"

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return 50_000, False

    def _find(self, root: Path) -> list[Path]:
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
        return _all_or_none(self._base(root) / name for name in names)

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        *train, test, meta = self._find(root)
        return _cifar({"train": train, "test": [test]}, meta, "labels", "label_names")


@dataclass(frozen=True, kw_only=True)
class CIFAR100(Source):
    """50,000 and 10,000 colour images of 32x32 pixels in 100 classes.

    Read from ``cifar100/*.parquet`` (the hub's ``uoft-cs/cifar100``) if that is there, else from torchvision's
    ``cifar-100-python``. The rows of the two are in another order, so they are two contents with two digests.
    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    NATIVE = (100, 3, 32)
    TORCHVISION = "CIFAR100"
    WHERE = "cifar100/{train,test}*.parquet or cifar-100-python/{train,test,meta}"

    def _base(self, root: Path) -> Path:
        return root / "cifar100" if _shards(self.name, root / "cifar100") else root / "cifar-100-python"

    def _train_count(self, root: Path) -> tuple[int, bool]:
        return 50_000, False

    def _find(self, root: Path) -> list[Path]:
        shards = _shards(self.name, root / "cifar100")
        if shards:
            return [file for files in shards.values() for file in files]
        return _all_or_none(root / "cifar-100-python" / name for name in ("train", "test", "meta"))

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        shards = _shards(self.name, root / "cifar100")
        if not shards:
            train, test, meta = self._find(root)
            return _cifar({"train": [train], "test": [test]}, meta, "fine_labels", "fine_label_names")
        parts, classes = _hub(self, shards, None, "fine_label")
        return _kept(self, parts, 32, root, MEMORY, cache), classes  # 184 MB: always in memory


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """Own images: ``folder/{train,val,test}/<class>/<any name>.{png,jpg,...}``.

    Without ``test/`` the images of ``val/`` are the test set and validation is cut out of train: what a run is
    selected by is never what it is judged by. The id of a sample is 63 bits of the sha256 of its path in the folder.

    Args:
        folder: relative to the folder of data sets, or absolute.
        side: pixels images are brought to before they are cropped to ``size``; null: ``size`` if the images have just
            this size, otherwise 8/7 of it.
    """

    folder: str
    side: int

    WHERE = "train/<class>/ and val/<class>/ with images"

    def _base(self, root: Path) -> Path:
        return root / Path(self.folder).expanduser()

    def _missing(self, root: Path) -> str:
        return f"{self.name}: no {self.WHERE} in {self._base(root)}; set data.folder to the folder that holds them"

    def _parts(self, root: Path) -> dict[str, list[tuple[str, Path]]]:
        """(class, file) of each part in the order of their names."""
        base = self._base(root)
        folders: dict[str, Path] = {}
        for folder in sorted(base.iterdir()) if base.is_dir() else ():
            part = _PARTS.get(folder.name.lower())
            if part and folder.is_dir() and folders.setdefault(part, folder) != folder:
                raise InputError(f"{self.name}: {base} has {folders[part].name} and {folder.name}; keep one of the two")
        found = {part: list(_labelled(folder)) for part, folder in folders.items()}
        return _with_test({part: files for part, files in found.items() if files})

    def _train_count(self, root: Path) -> tuple[int, bool]:
        parts = self._parts(root)
        return len(parts["train"]), "validation" in parts

    def _find(self, root: Path) -> list[Path]:
        return sorted(file for files in self._parts(root).values() for _, file in files)

    def resolved(self, root: Path) -> Self:
        """The same set with classes, channels, size, mean and std as the files have them.

        Null ``size`` is the shortest side among the first image of each class, 224 at most. Null ``mean`` and ``std``
        are ImageNet's.
        """
        from kd.data import readers

        self.files(root)
        first: dict[str, Path] = {}
        for label, file in self._parts(_folder(root))["train"]:
            first.setdefault(label, file)
        return replace(self, **_found(self, len(first), [readers.header(file) for file in first.values()]))

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        import numpy as np

        base, found = self._base(root), self._parts(root)
        classes = sorted({label for label, _ in found["train"]})
        number = {label: i for i, label in enumerate(classes)}
        parts = {}
        for part, rows in found.items():
            for label, file in rows:
                if label not in number:
                    near = nearest(label, classes)
                    raise InputError(f"{self.name}: {file.parent} is a class that train/ does not have{near}")
            ids = np.array([_path_id(file.relative_to(base)) for _, file in rows], np.int64)
            targets = np.array([number[label] for label, _ in rows], np.int64)
            parts[part] = _Part(ids, targets, [file for _, file in rows], None)
        return _kept(self, parts, self.side, root, memory_bytes, cache), tuple(classes)


@dataclass(frozen=True, kw_only=True)
class HubImages(Source):
    """A folder of parquet shards as a data set of images has them on the Hugging Face hub; fetch it there first.

    Shards are told apart by their names (``train-00000-of-00002.parquet``) or their folder's. Without test shards those
    of validation are the test set and validation is cut out of train. The id of a sample is its row in its part.

    Args:
        folder: relative to the folder of data sets, or absolute.
        side: as in `ImageFolder`.
        image_column: null: found in the schema.
        label_column: null: ``fine_label`` or ``label``.
    """

    folder: str
    side: int
    image_column: str | None = None
    label_column: str | None = None

    WHERE = "train*.parquet and test*.parquet (or validation*.parquet)"

    def _base(self, root: Path) -> Path:
        return root / Path(self.folder).expanduser()

    def _missing(self, root: Path) -> str:
        return f"{self.name}: no {self.WHERE} in {self._base(root)}; set data.folder to the folder that holds them"

    def _find(self, root: Path) -> list[Path]:
        return [file for files in _shards(self.name, self._base(root)).values() for file in files]

    def _train_count(self, root: Path) -> tuple[int, bool]:
        from kd.data import readers

        shards = _shards(self.name, self._base(root))
        return sum(map(readers.parquet_rows, shards["train"])), "validation" in shards

    def _hub(self, root: Path) -> tuple[dict[str, _Part], tuple[str, ...]]:
        return _hub(self, _shards(self.name, self._base(root)), self.image_column, self.label_column)

    def resolved(self, root: Path) -> Self:
        """As `ImageFolder.resolved`, from the first 64 images of train."""
        from itertools import islice

        from kd.data import readers

        self.files(root)
        parts, classes = self._hub(_folder(root))
        return replace(
            self, **_found(self, len(classes), [readers.header(item) for item in islice(parts["train"].items(), 64)])
        )

    def _read(self, root: Path, memory_bytes: int, cache: Path | None) -> tuple[dict[str, Split], tuple[str, ...]]:
        parts, classes = self._hub(root)
        return _kept(self, parts, self.side, root, memory_bytes, cache), classes


@dataclass(frozen=True)
class _Part:
    """Labels of a part whose images are still encoded: in files, or (None) in what ``blobs`` yields."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    paths: list[Path] | None
    blobs: Callable[[], Iterator[Blob]] | None

    def items(self) -> Iterator[Path | Blob]:
        yield from self.paths if self.paths is not None else self.blobs() if self.blobs else ()


def _kept(
    source: Source, parts: Mapping[str, _Part], side: int, root: Path, memory_bytes: int, cache: Path | None
) -> dict[str, Split]:
    """Decoded in memory if they fit there, otherwise as files for the loader to decode."""
    from kd.data import readers
    from kd.data.split import Split, held, tensor

    need = sum(len(part.ids) for part in parts.values()) * source.channels * side**2
    key = ""
    if cache is not None:
        column = getattr(source, "image_column", None)  # a shard may hold several images a row
        words = [source.content_digest(root, cache / DIGESTS), source.VERSION, column]
        key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
    if need <= memory_bytes:

        def make() -> dict[str, NDArray[np.uint8]]:
            return {
                name: readers.decode_all(
                    part.items(), len(part.ids), side, source.channels, f"decoding {source.name} {name}"
                )
                for name, part in parts.items()
            }

        images = kept.arrays(cache, f"{key}-{source.channels}x{side}", make)
        return {name: held(images[name], part.targets, part.ids) for name, part in parts.items()}
    result = {}
    for name, part in parts.items():
        paths = part.paths
        if paths is None and part.blobs is not None:
            if cache is None:
                raise InputError(
                    f"{source.name} takes {need / 2**30:.1f} GiB decoded and run.memory_gb allows "
                    f"{memory_bytes / 2**30:.1f}; raise it, or give a cache folder to unpack the images into"
                )
            paths = kept.unpacked(cache, f"{key}-{name}", part.blobs(), len(part.ids))
        result[name] = Split(
            tensor(part.ids), tensor(part.targets), paths=tuple(paths or ()), side=side, channels=source.channels
        )
    return result


def _hub(
    source: Source, shards: Mapping[str, Sequence[Path]], image_column: str | None, label_column: str | None
) -> tuple[dict[str, _Part], tuple[str, ...]]:
    import numpy as np

    from kd.data import readers

    tables = {part: readers.parquet(paths, image_column, label_column) for part, paths in shards.items()}
    train = tables["train"]
    words = isinstance(next(iter(train.labels), 0), str)
    if words:
        classes = tuple(sorted({str(label) for label in train.labels}))
    else:
        highest = max((int(label) for table in tables.values() for label in table.labels), default=-1)
        classes = train.names or tuple(str(i) for i in range(highest + 1))
    number = {name if words else i: i for i, name in enumerate(classes)}
    parts = {}
    for part, table in tables.items():
        unknown = next((label for label in table.labels if label not in number), None)
        if unknown is not None:
            near = nearest(str(unknown), classes)
            raise InputError(f"{source.name}: {part} has the label {unknown!r}, which is no class of train{near}")
        targets = np.array([number[label] for label in table.labels], np.int64)
        parts[part] = _Part(np.arange(len(targets), dtype=np.int64), targets, None, table.blobs)
    return parts, classes


def _found(source: ImageFolder | HubImages, classes: int, headers: Sequence[Header]) -> dict[str, Any]:
    """The fields that were null, from the number of classes and some images."""
    if source.num_classes is not None and source.num_classes != classes:
        raise InputError(f"data.num_classes={source.num_classes}: {source.name} has {classes}; leave it null")
    channels = source.channels or (1 if all(h.grey for h in headers) else 3)
    size = source.size or min(224, *(min(h.width, h.height) for h in headers))
    exact = all((h.width, h.height) == (size, size) for h in headers)
    # ImageNet's; on grey, what they come to when the channels are averaged.
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.449], [0.226])
    return {
        "num_classes": classes,
        "channels": channels,
        "size": size,
        "side": source.side or (size if exact else round(size * 8 / 7)),
        "mean": source.mean or mean,
        "std": source.std or std,
    }


def _idx_files(folder: Path) -> list[Path]:
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    packed = [folder / f"{name}.gz" for name in names]
    return _all_or_none(f if f.is_file() else gz for f, gz in zip((folder / n for n in names), packed, strict=True))


def _idx_count(path: Path) -> int:
    """Entries of an IDX file, by its header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        return int.from_bytes(file.read(8)[4:], "big")


def _idx(files: Sequence[Path]) -> dict[str, Split]:
    from kd.data import readers
    from kd.data.split import held

    parts = {}
    for part, (images, labels) in {"train": files[:2], "test": files[2:]}.items():
        pixels, targets = readers.idx(images), readers.idx(labels)
        if pixels.shape[1:] != (28, 28) or targets.shape != pixels.shape[:1] or targets.max(initial=0) > 9:
            raise InputError(f"{images} and {labels.name} do not belong together; delete both and run again")
        parts[part] = held(pixels[:, None], targets)
    return parts


def _cifar(
    files: Mapping[str, Sequence[Path]], meta: Path, labels: str, names: str
) -> tuple[dict[str, Split], tuple[str, ...]]:
    import numpy as np

    from kd.data import readers
    from kd.data.split import held

    classes = tuple(readers.cifar(meta).get(names, ()))
    parts = {}
    for part, paths in files.items():
        batches = [readers.cifar(path) for path in paths]
        try:
            images = np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches]).reshape(-1, 3, 32, 32)
            targets = np.concatenate([np.asarray(batch[labels], np.int64) for batch in batches])
        except (KeyError, ValueError) as error:
            raise InputError(f"{paths[0]} is no batch of CIFAR ({error}); delete it and run again") from error
        if len(images) != len(targets) or not 0 <= targets.min() <= targets.max() < len(classes):
            raise InputError(f"{paths[0].parent}: images, labels and {meta.name} do not belong together; delete them")
        parts[part] = held(images, targets)
    return parts, classes


def _shards(name: str, folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each part; none at all if train, or something to test on, is absent."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.parquet")) if folder.is_dir() else ():
        part = _PARTS.get(re.split(r"[-_.]", file.stem.lower())[0]) or _PARTS.get(file.parent.name.lower())
        if part:
            found.setdefault(part, []).append(file)
    for part, files in found.items():
        if len({file.parent for file in files}) > 1:
            raise InputError(
                f"{name}: {folder} has {part} shards in several folders; set data.folder to the folder of one of them"
            )
        total = re.search(r"-of-(\d+)$", files[0].stem)
        if total and len(files) != int(total[1]):
            raise InputError(
                f"{name}: {files[0].parent} has {len(files)} of {int(total[1])} {part} shards; fetch the rest"
            )
    return _with_test(found)


def _with_test(parts: dict[str, T]) -> dict[str, T]:
    """With the images of validation as the test set where there is none; empty without train or a test set."""
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return dict(sorted(parts.items())) if {"train", "test"} <= set(parts) else {}


def _labelled(folder: Path) -> Iterator[tuple[str, Path]]:
    """(class, file) of each image below a folder of class folders, in the order of their names."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            for file in sorted(child.rglob("*")):
                if file.suffix.lower() in _IMAGES and not file.name.startswith(".") and file.is_file():
                    yield child.name, file


def _path_id(path: Path) -> int:
    """63 bits that name a file by its path in the data set: the same whatever else is in there."""
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") >> 1


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all_or_none(files: Iterator[Path]) -> list[Path]:
    found = list(files)
    return found if all(file.is_file() for file in found) else []


def _folder(path: Path | str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


@contextmanager
def _impatient() -> Iterator[None]:
    """Connections that are given up after `PATIENCE` seconds: torchvision itself would wait for ever."""
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
