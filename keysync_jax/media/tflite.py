"""TFLite networks through LiteRT: a whole file, or the part of one between given tensors.

LiteRT runs the built-in operations on every Python and processor that has wheels. Operations of mediapipe's own are not among them;
a network that has such runs in parts, and what stands between the parts is ours (see `media.face_networks`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flatbuffers import flexbuffers

from keysync_jax.core.errors import KeySyncError

_IDENTIFIER = b"TFL3"


class TfliteFile:
    """A `.tflite` file with one graph.

    Args:
      path: of the file.

    Raises:
      KeySyncError: the file is no TFLite network.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = path.read_bytes()
        if self._data[4:8] != _IDENTIFIER:
            raise KeySyncError(f"{path} is no .tflite network; take the face models anew with keysync fetch faces --from FILE")

    @functools.cached_property
    def _model(self) -> schema.ModelT:
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(self._data, 0))

    @property
    def _graph(self) -> schema.SubGraphT:
        (graph,) = self._model.subgraphs or [schema.SubGraphT()]
        return graph

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {_name(tensor): number for number, tensor in enumerate(self._graph.tensors or ())}

    def options_of(self, output: str) -> dict:
        """The settings of the custom operation that makes the tensor `output`."""
        options = flexbuffers.Loads(bytes(np.asarray(self._maker(output).customOptions, np.uint8)))
        if not isinstance(options, dict):
            raise KeySyncError(f"{self.path}: the operation that makes {output} has no table of settings")
        return options

    def inputs_of(self, output: str) -> list[str]:
        """Names of the tensors that the operation making `output` reads."""
        names = {number: name for name, number in self._number.items()}
        return [names[number] for number in _numbers(self._maker(output).inputs)]

    def _maker(self, output: str) -> schema.OperatorT:
        return next(op for op in self._graph.operators or () if self._number[output] in _numbers(op.outputs))

    def network(self, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> TfliteNetwork:
        """The part that makes `outputs` from `inputs`; the whole graph by default.

        Raises:
          KeySyncError: LiteRT does not take it.
        """
        if not inputs and not outputs:
            return TfliteNetwork(self._data, str(self.path))
        graph, model = self._graph, self._model
        own = (graph.inputs, graph.outputs, graph.operators)
        first = [self._number[name] for name in inputs] or _numbers(graph.inputs)
        last = [self._number[name] for name in outputs] or _numbers(graph.outputs)
        try:
            graph.inputs, graph.outputs, graph.operators = first, last, _between(graph.operators or (), first, last)
            builder = flatbuffers.Builder(1 << 22)
            builder.Finish(model.Pack(builder), _IDENTIFIER)
        finally:
            graph.inputs, graph.outputs, graph.operators = own
        return TfliteNetwork(bytes(builder.Output()), str(self.path))


def _name(tensor: schema.TensorT) -> str:
    # The generated class says str | None and holds the file's bytes.
    return bytes(tensor.name or b"").decode() if not isinstance(tensor.name, str) else tensor.name


def _numbers(tensors: Sequence[int] | None) -> list[int]:
    # An array where NumPy is there, whose truth is not its length.
    return [] if tensors is None else [int(number) for number in tensors]


def _between(operators: Sequence[schema.OperatorT], first: Sequence[int], last: Sequence[int]) -> list[schema.OperatorT]:
    """The operators, in order, that `last` needs where the tensors `first` are given."""
    needed, kept = set(last), []
    for operator in reversed(operators):
        if needed.intersection(_numbers(operator.outputs)) - set(first):
            kept.append(operator)
            needed.update(_numbers(operator.inputs))
    return kept[::-1]


class TfliteNetwork:
    """A network held open. Calls are not to be made from two threads at once."""

    def __init__(self, content: bytes, name: str):
        with _captured_stderr():
            self._open(content, name)

    def _open(self, content: bytes, name: str) -> None:
        try:
            # One thread: results do not depend on how many there are.
            self._interpreter = Interpreter(model_content=content, num_threads=1)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise KeySyncError(f"{name}: LiteRT does not run this network: {error}") from error
        self._inputs = [entry["index"] for entry in self._interpreter.get_input_details()]
        self._outputs = [entry["index"] for entry in self._interpreter.get_output_details()]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """One array per output, in the order of the part's outputs; the inputs in the order of its inputs."""
        for index, array in zip(self._inputs, arrays, strict=True):
            self._interpreter.set_tensor(index, np.ascontiguousarray(array, np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


@contextlib.contextmanager
def _captured_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere while LiteRT opens a network: its native code logs there whatever the Python logging says.

    What it has to say as an error arrives as an exception, and those are reported.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # no standard error at all: nothing to protect
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
