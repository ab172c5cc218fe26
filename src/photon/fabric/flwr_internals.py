"""Every symbol of Flower that Photon uses, in one place, with the little that both ends of a message share.

`flwr` is pinned exactly, because half of this is internal there; tests/fabric/test_flwr_internals.py says in one line
what broke when the pin moves. No other module of Photon imports `flwr`.

Flower is the control plane: which nodes are there, and small questions to them with their answers. Model bytes never
pass through it. Its own retries end the process on some errors and wait without a deadline on others; here a call is
tried once, with a timeout, and the caller decides.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from photon.errors import PhotonError

__all__ = [
    "CALL_TIMEOUT_S",
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "HEARTBEAT_S",
    "MESSAGE_TYPE",
    "PROTOBUF_MEDIA_TYPE",
    "RUN_ENDED",
    "SUPERLINK_NODE_ID",
    "TIMESTAMP_HEADER",
    "AcquireTaskRequest",
    "ActivateNodeRequest",
    "ConfirmMessageReceivedRequest",
    "Content",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "Fab",
    "FleetHttpClient",
    "FlowerDownError",
    "GetNodesRequest",
    "Message",
    "Metadata",
    "Node",
    "ObjectPushError",
    "ObjectTree",
    "ObjectUnavailableError",
    "ProtoMessage",
    "PullAppMessagesRequest",
    "PullMessagesRequest",
    "PullObjectRequest",
    "PullTaskInputRequest",
    "PushAppMessagesRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "PushTaskOutputRequest",
    "RegisterNodeFleetRequest",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendNodeHeartbeatRequest",
    "SendTaskHeartbeatRequest",
    "StartRunRequest",
    "SuperExecAuthHttpInterceptor",
    "direct",
    "fab_to_proto",
    "failures",
    "fetch_content",
    "flower_environment",
    "get_all_nested_objects",
    "get_object_tree",
    "make_pull_object_fn_protobuf",
    "make_push_object_fn_protobuf",
    "message_from_proto",
    "message_to_proto",
    "new_message",
    "no_object_id_recompute",
    "now",
    "photon_app",
    "public_key_to_bytes",
    "push_objects",
    "remove_content_from_message",
    "sign_message",
    "superlink_arguments",
    "superlink_main",
]

CALL_TIMEOUT_S = 10.0
HEARTBEAT_S = 10.0  # the least that Flower takes; a node is offline after two
MESSAGE_TYPE = "query.photon"
RUN_ENDED = 2007  # ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED: a call about a run of Flower's that is over
_OBJECT_TIMEOUT_S = 15.0
_RECORD = "photon"
_MAX_OBJECTS = 16

Content = dict[str, str | bytes]
_Client = TypeVar("_Client", bound=ProtobufClient)


class FlowerDownError(PhotonError):
    """A call to Flower failed; `status` is its HTTP status, 0 if there was no answer at all; `code` is Flower's own.

    `is_tls`: TLS let no call pass.
    """

    def __init__(self, message: str, status: int = 0, code: int = 0, is_tls: bool = False) -> None:
        super().__init__(message)
        self.status, self.code, self.is_tls = status, code, is_tls


def flower_environment(base: Mapping[str, str], home: Path) -> dict[str, str]:
    """The environment of a Flower process: it phones nobody, installs nothing, and keeps its files in `home`."""
    return dict(base) | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def direct(client: _Client, verify: ssl.SSLContext | bool = True) -> _Client:
    """The same client, but one that goes where it is told: by no proxy of the environment, and sent on by nobody.

    No proxy finds a SuperLink on our loopback. A node calls the gateway as it fetches bytes there, without one; and
    it is not the Aggregator that decides which machines of an owner's network its node speaks to.
    """
    client._client.close()
    client._client = httpx.Client(verify=verify, timeout=client._client.timeout, trust_env=False)
    return client


def superlink_arguments(port: int, database: Path, secret_file: Path) -> list[str]:
    """Arguments of a SuperLink on loopback that runs nothing by itself and keeps its messages on disk."""
    return [
        *("--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"),
        *("--database", str(database), "--superexec-auth-secret-file", str(secret_file)),
    ]


def photon_app(pyproject: str) -> bytes:
    """The bundle that Flower wants for a run: this one file."""
    from flwr.cli.build import build_fab_from_files  # half a second that only the Aggregator need spend

    return bytes(build_fab_from_files({"pyproject.toml": pyproject.encode()})[0])


def superlink_main() -> None:
    """Flower's own program, in this process; it reads `sys.argv`."""
    from flwr.superlink.cli.flower_superlink import flower_superlink  # nodes need none of what it imports

    flower_superlink()


def new_message(metadata: Metadata, content: Content) -> Message:
    """A message of Flower's with its identity set."""
    message = make_message(metadata, content=RecordDict({_RECORD: ConfigRecord(dict(content))}))
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Everything that Flower's client raises, as one error of ours."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        reason = f"[{said.code}] {said.message}" if said else error.response.text[:200]
        status = error.response.status_code
        code = int(said.code) if said else 0
        raise FlowerDownError(f"Flower refused to {what}: HTTP {status} {reason}", status, code) from error
    except (httpx.HTTPError, ObjectPushError, OSError, ValueError) as error:
        sentence = f"cannot {what} through Flower: {type(error).__name__}: {error}"
        raise FlowerDownError(sentence, is_tls=_is_of_tls(error)) from error


def _is_of_tls(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__  # httpcore names no cause
    return error is not None


def fetch_content(message_id: str, tree: ObjectTree, pull: Callable[[str], bytes]) -> Content:
    """The content of a message whose parts `pull` fetches. Raises ValueError if it is incomplete or none of ours."""
    ids = [node.object_id for node in iterate_object_tree(tree)]
    if len(ids) > _MAX_OBJECTS:
        raise ValueError(f"a control message of {len(ids)} objects")
    try:
        parts = pull_objects(ids, pull, max_time=_OBJECT_TIMEOUT_S)
    except ObjectPullError as error:
        raise ValueError(f"a message that is not whole: {error}") from error
    try:
        message = inflate_object_from_contents(message_id, parts)
        if not isinstance(message, Message):
            raise TypeError(f"{message_id} is no message")
        record = message.content[_RECORD]
        return {str(key): value for key, value in record.items() if isinstance(value, str | bytes)}
    except Exception as error:  # what Flower makes of a stranger's bytes has many names, RecursionError among them
        raise ValueError(f"no message of Photon's: {type(error).__name__}: {error}") from error
