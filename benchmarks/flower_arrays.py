"""The other yardstick of `benchmarks.exchange`: the same bytes as Flower's own arrays, through a SuperLink and back.

Everything that a deployment of Flower adds beyond the transport (a SuperNode's store, a process for each message) is
left out, so this is the least that it can cost: ServerApp's grid, SuperLink in memory, one client.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import make_message

from photon.fabric import flwr_internals as flower
from photon.fabric.fleet import NodeKeys
from photon.fabric.flower_run import FlowerRun
from photon.fabric.supervise import free_port

_TENSORS = 64
_TIMEOUT_S = 600.0


def round_trip(folder: Path, size: int) -> tuple[float, float, int]:
    """Seconds down, seconds up, and the SuperLink's peak memory in bytes, for `size` bytes of float32 arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    secret, port = folder / "secret", free_port()
    secret.write_bytes(os.urandom(32))
    command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(secret)]
    program = Path(sys.executable).with_name(command[0])
    with (folder / "superlink.log").open("wb") as log:
        environment = flower.flower_environment(os.environ, folder / "home")
        superlink = subprocess.Popen([str(program), *command[1:]], env=environment, stdout=log, stderr=log)
    try:
        run = _connect(f"127.0.0.1:{port}", secret.read_bytes())
        client, node = _client(f"http://127.0.0.1:{port}")
        arrays = {f"t{i}": np.zeros(size // 4 // _TENSORS, np.float32) + i for i in range(_TENSORS)}
        message = flower.Metadata(run.run_id, "", 1, node.node_id, "", "", time.time(), _TIMEOUT_S, flower.MESSAGE_TYPE)
        began = time.monotonic()
        _push(run._client, run._node, run.run_id, message, arrays)
        asked, received = _pull(client, node, run.run_id)
        down_s = time.monotonic() - began
        began = time.monotonic()
        answer = flower.Metadata(
            run.run_id, "", node.node_id, 1, asked, "", time.time(), _TIMEOUT_S / 2, flower.MESSAGE_TYPE
        )
        _push(client, node, run.run_id, answer, received)
        reply = run._client.PullMessages(flower.PullAppMessagesRequest(message_ids=[asked]))
        pull = flower.make_pull_object_fn_protobuf(run._client.PullObject, run._node, run.run_id)
        _inflate(reply.messages_list[0].metadata.message_id, reply.message_object_trees[0], pull)
        up_s = time.monotonic() - began
        peak = int(_status(superlink.pid, "VmHWM")) * 1024
        return down_s, up_s, peak
    finally:
        superlink.kill()
        superlink.wait()


def _connect(address: str, secret: bytes) -> FlowerRun:
    end = time.monotonic() + 90
    while True:
        try:
            return FlowerRun(address, secret)
        except flower.FlowerDownError:
            assert time.monotonic() < end, "the SuperLink did not come up"
            time.sleep(0.3)


def _client(url: str) -> tuple[flower.FleetHttpClient, flower.Node]:
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = NodeKeys(b"benchmark").private("node")
    client = flower.FleetHttpClient(
        url, interceptors=[NodeAuthHttpInterceptor(private, private.public_key())], timeout=60.0
    )
    key = bytes(flower.public_key_to_bytes(private.public_key()))
    client.RegisterNode(flower.RegisterNodeFleetRequest(public_key=key))
    activated = client.ActivateNode(flower.ActivateNodeRequest(public_key=key, heartbeat_interval=1800))
    return client, flower.Node(node_id=activated.node_id)


def _push(client, node, run_id, metadata, arrays) -> None:  # type: ignore[no-untyped-def]  # Flower's own types
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    with flower.no_object_id_recompute():
        message = make_message(metadata, content=RecordDict({"arrays": record}))
        message.metadata.__dict__["_message_id"] = message.object_id
        request = {
            "messages_list": [flower.message_to_proto(flower.remove_content_from_message(message))],
            "message_object_trees": [flower.get_object_tree(message)],
        }
        if isinstance(client, flower.FleetHttpClient):
            response = client.PushMessages(
                flower.PushMessagesRequest(node=node, clientapp_runtime_list=[0.0], **request)
            )
        else:
            response = client.PushMessages(flower.PushAppMessagesRequest(**request))
        push = flower.make_push_object_fn_protobuf(client.PushObject, node, run_id, response.session_id)
        objects = flower.get_all_nested_objects(message)
        flower.push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))


def _pull(client, node, run_id):  # type: ignore[no-untyped-def]  # Flower's own types
    response = client.PullMessages(flower.PullMessagesRequest(node=node))
    pull = flower.make_pull_object_fn_protobuf(client.PullObject, node, run_id)
    message_id = response.messages_list[0].metadata.message_id
    return message_id, _inflate(message_id, response.message_object_trees[0], pull)


def _inflate(message_id, tree, pull):  # type: ignore[no-untyped-def]  # Flower's own types
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

    ids = [node.object_id for node in iterate_object_tree(tree)]
    message = inflate_object_from_contents(message_id, pull_objects(ids, pull))
    return {name: array.numpy() for name, array in message.content["arrays"].items()}


def _status(pid: int, key: str) -> str:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key))
    return line.split()[1]
