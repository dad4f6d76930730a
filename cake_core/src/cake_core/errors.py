"""Every error Cake raises on purpose, in one tree.

::

    CakeError                       something the user can act on; the message says what to do next
    +-- ConfigError                 a file, flag or combination is wrong (exit code 2, HTTP 400)
    |   +-- TopologyError           the topology file, or its fit to the model
    |   +-- CheckpointError         a model that is missing, unreadable, truncated or corrupt
    |   |   +-- UnsupportedModel    an architecture, tensor type or quantisation nobody installed serves
    |   +-- PluginError             a plugin that is missing or broken
    +-- RequestError                one request is wrong (exit code 2, HTTP 400), names the parameter
    |   +-- ContextLengthError      prompt and answer do not fit the context
    +-- CapacityError               weights or KV cache do not fit; the queue is full (HTTP 503 or 429)
    |   +-- QueueFullError
    +-- StageError                  a stage failed at a batch it was given (HTTP 500)
    |   +-- RewindError             a stage cannot go back to where a row begins
    +-- NodeError                   a node cannot serve, named with its address (HTTP 503)
    |   +-- NodeUnreachable         nobody answers at the address
    |   +-- NodeLost                it was there and is gone
    |   +-- NodeMismatch            it serves another model, other layers or another protocol version
    |   |   +-- NodeUnassigned      it brought no layers and waits for a master to assign some
    |   +-- NodeBusy                another master holds it
    +-- TransportError              below a node: bytes could not be moved
    |   +-- ChannelClosed           the peer closed, or we did
    |   +-- DeadlineExceeded        nothing came in time
    |   +-- ProtocolError           bytes that are not our protocol, or over a limit
    |   +-- AuthenticationError     the peer does not hold the cluster key
    +-- Cancelled                   the request was cancelled by its owner

Anything else that escapes is a bug and keeps its traceback. Each edge maps this tree once: `exit_code` here for the
command line, one function in cake_server for HTTP.
"""

from __future__ import annotations


class CakeError(Exception):
    """Base of every expected error. `str(error)` is one sentence for the user, with the remedy."""

    exit_code = 1
    code = "internal_error"


class ConfigError(CakeError):
    exit_code = 2
    code = "invalid_config"


class TopologyError(ConfigError):
    code = "invalid_topology"


class CheckpointError(ConfigError):
    code = "invalid_checkpoint"


class UnsupportedModel(CheckpointError):
    code = "unsupported_model"


class PluginError(ConfigError):
    code = "plugin_error"


class RequestError(CakeError):
    """A request that cannot be served as asked; `param` is the path of the offending field, if one is."""

    exit_code = 2
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class CapacityError(CakeError):
    code = "insufficient_capacity"


class QueueFullError(CapacityError):
    code = "queue_full"


class StageError(CakeError):
    code = "stage_error"


class RewindError(StageError):
    code = "rewind_error"


class NodeError(CakeError):
    """A node cannot serve; `node` is its name in the topology, `address` where it was looked for."""

    code = "node_error"

    def __init__(self, message: str, node: str = "", address: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.address = address


class NodeUnreachable(NodeError):
    code = "node_unreachable"


class NodeLost(NodeError):
    code = "node_lost"


class NodeMismatch(NodeError):
    exit_code = 2
    code = "node_mismatch"


class NodeUnassigned(NodeMismatch):
    code = "node_unassigned"


class NodeBusy(NodeError):
    code = "node_busy"


class TransportError(CakeError):
    code = "transport_error"


class ChannelClosed(TransportError):
    code = "channel_closed"


class DeadlineExceeded(TransportError):
    code = "deadline_exceeded"


class ProtocolError(TransportError):
    code = "protocol_error"


class AuthenticationError(TransportError):
    code = "authentication_failed"


class Cancelled(CakeError):
    code = "cancelled"
