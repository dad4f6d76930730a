"""A model whose files are on their way: opened as soon as its headers are here, and read as its weights come."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CakeError, CheckpointError
from cake_core.resolve import open_path
from cake_core.weights.manifest import FileSpec
from cake_core.weights.transfer import Transfer
from cake_core.weights.views import Views


class Arriving:
    """Runs a transfer in a thread while the block runs; whatever ends the block ends the transfer, which waits for its rest
    otherwise."""

    def __init__(self, transfer: Transfer, views: Views, files: Sequence[FileSpec], model: str) -> None:
        self._transfer = transfer
        self._views = views
        self._files = files
        self._model = model
        self._error: CakeError | None = None
        self._thread = threading.Thread(target=self._run, name="cake-transfer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._transfer.cancel(error if isinstance(error, CakeError) else CheckpointError("loading has failed"))
        self._thread.join()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def headers(self) -> Checkpoint:
        """The model as soon as it can be described; its `read_into` waits for what is not here yet. Whole where files cannot be
        read while they are written. Raises what ended the transfer."""
        self._transfer.wait_fronts()
        folder = self._views.lay_out_arriving(self._files)
        if folder is None:
            return self.whole()
        names = {folder.absolute() / file.path: file.name for file in self._files}

        def wait(file: Path, start: int, stop: int) -> None:
            if file in names:
                self._transfer.wait(names[file], start, stop)

        checkpoint = open_path(folder, self._model)
        checkpoint.wait = wait
        return checkpoint

    def whole(self) -> Checkpoint:
        """The model once all of it is here. Raises what ended the transfer."""
        self.finish()
        return open_path(self._views.lay_out(self._files), self._model)

    def finish(self) -> None:
        """Waits for the rest. Raises what ended the transfer."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._transfer.run()
        except CakeError as error:
            self._error = error
        except Exception as error:  # so that nobody waits for bytes that will not come
            self._error = CheckpointError(f"the weights cannot be fetched: {type(error).__name__}: {error}")
        if self._error is not None:
            self._transfer.cancel(self._error)
