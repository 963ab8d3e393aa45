"""What the lab's Kubernetes API server answers, and that a real one answers the same.

Everything here runs over ours, plain and with TLS, and with --kube-apiserver PATH over that kube-apiserver.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_server import (
    HAS_KUBECTL,
    MISSING,
    POOR_TOKEN,
    SHARED,
    Client,
    Real,
    Running,
    kubectl,
    write_kubeconfig,
)

from udptun.lab.kube_api.patch import MERGE, STRATEGIC

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.xdist_group("kube-api"),
]


@pytest.fixture(scope="module", params=["plain", "tls", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program = request.config.getoption("--kube-apiserver")
    if request.param == "real" and program is None:
        pytest.skip("give kube-apiserver's program with --kube-apiserver PATH")
    yield SHARED.get(request.param, tmp_path_factory.mktemp(request.param), program)
    SHARED.close()


@pytest.fixture
def client(server: Running) -> Client:
    """An administrator's; there is no node."""
    client = Client(server.url, ca=server.ca)
    for name in client.names():
        client.delete(name)
    return client


def patch(client: Client, path: str, body: Any, kind: str = STRATEGIC) -> Any:
    answer = client.ask("PATCH", path, body, kind)
    assert answer.status == 200, answer
    return answer.value


def test_a_list_in_pages_has_every_node_once_as_it_was_at_the_first_page(client: Client) -> None:
    for number in range(7):
        client.add_node(f"n{number}", f"10.244.{number}.0/24")
    page = client.get("/api/v1/nodes?limit=3")
    client.delete("n5")
    client.add_node("n9")
    pages = [page]
    while token := pages[-1]["metadata"].get("continue"):
        pages.append(client.get(f"/api/v1/nodes?limit=3&continue={token}"))
    assert [len(page["items"]) for page in pages] == [3, 3, 1]
    names = [node["metadata"]["name"] for page in pages for node in page["items"]]
    assert names == [f"n{number}" for number in range(7)]
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    assert page["metadata"]["remainingItemCount"] == 4
    assert page["kind"] == "NodeList"


def test_a_list_of_any_revision_has_no_pages(client: Client) -> None:
    for number in range(5):
        client.add_node(f"n{number}")
    # The watch cache of a real one may be some milliseconds behind.
    for _ in range(100):
        listed = client.get("/api/v1/nodes?limit=2&resourceVersion=0")
        if len(listed["items"]) == 5:
            break
    assert len(listed["items"]) == 5
    assert "continue" not in listed["metadata"]


def test_a_list_that_is_continued_after_a_compaction_is_gone(server: Running, client: Client) -> None:
    for number in range(3):
        client.add_node(f"n{number}")
    token = client.get("/api/v1/nodes?limit=1")["metadata"]["continue"]
    client.add_node("n3")
    server.compact()
    answer = client.ask("GET", f"/api/v1/nodes?limit=1&continue={token}")
    assert (answer.status, answer.value["reason"]) == (410, "Expired")


def test_one_node_is_listed_by_its_name(client: Client) -> None:
    client.add_node("n1")
    client.add_node("n2")
    listed = client.get("/api/v1/nodes?fieldSelector=metadata.name%3Dn2")
    assert [node["metadata"]["name"] for node in listed["items"]] == ["n2"]


def test_a_watch_tells_everything_after_its_revision_in_order(client: Client) -> None:
    after = client.get("/api/v1/nodes")["metadata"]["resourceVersion"]
    client.add_node("n1", "10.244.1.0/24")
    client.annotate("n1", {"a": "1"})
    client.delete("n1")
    path = f"/api/v1/nodes?watch=true&resourceVersion={after}&timeoutSeconds=20"
    with client.watch(path) as events:
        told = list(itertools.islice(events, 3))
    assert [event["type"] for event in told] == ["ADDED", "MODIFIED", "DELETED"]
    assert [event["object"]["metadata"].get("annotations", {}).get("a") for event in told] == [None, "1", "1"]
    assert all(event["object"]["spec"]["podCIDR"] == "10.244.1.0/24" for event in told)
    revisions = [int(event["object"]["metadata"]["resourceVersion"]) for event in told]
    assert revisions == sorted(set(revisions))
    # From the middle, it tells the rest.
    with client.watch(path.replace(f"={after}", f"={revisions[0]}")) as events:
        assert [event["type"] for event in itertools.islice(events, 2)] == ["MODIFIED", "DELETED"]


def test_a_watch_of_one_name_tells_nothing_of_others(client: Client) -> None:
    after = client.get("/api/v1/nodes")["metadata"]["resourceVersion"]
    client.add_node("n1")
    client.add_node("n2")
    path = f"/api/v1/nodes?fieldSelector=metadata.name%3Dn2&watch=true&resourceVersion={after}&timeoutSeconds=20"
    with client.watch(path) as events:
        assert next(events)["object"]["metadata"]["name"] == "n2"


def test_a_watch_ends_when_it_was_asked_to_and_a_bookmark_tells_how_far_it_came(
    server: Running, client: Client
) -> None:
    after = client.get("/api/v1/nodes")["metadata"]["resourceVersion"]
    client.add_node("n1")
    # A real one sends one 2 s before the end, and looks once a second.
    seconds = 8 if isinstance(server, Real) else 3
    path = f"/api/v1/nodes?allowWatchBookmarks=true&watch=true&resourceVersion={after}&timeoutSeconds={seconds}"
    with client.watch(path) as events:
        assert next(events)["type"] == "ADDED"
        client.annotate("n1", {"a": "1"})
        told = list(events)
    assert [event["type"] for event in told] == ["MODIFIED", "BOOKMARK"]
    modified, bookmark = (event["object"] for event in told)
    assert int(bookmark["metadata"]["resourceVersion"]) >= int(modified["metadata"]["resourceVersion"])
    assert bookmark["kind"] == "Node"
    assert "name" not in bookmark["metadata"]


def test_a_watch_gets_no_bookmark_while_nothing_has_changed_since_it_began(client: Client) -> None:
    client.add_node("n1")
    after = client.get("/api/v1/nodes")["metadata"]["resourceVersion"]
    path = f"/api/v1/nodes?allowWatchBookmarks=true&watch=true&resourceVersion={after}&timeoutSeconds=4"
    with client.watch(path) as events:
        assert list(events) == []


def test_a_watch_that_asks_for_no_bookmarks_gets_none(client: Client) -> None:
    after = client.get("/api/v1/nodes")["metadata"]["resourceVersion"]
    with client.watch(f"/api/v1/nodes?watch=true&resourceVersion={after}&timeoutSeconds=3") as events:
        assert list(events) == []


def test_a_watch_from_before_the_history_is_told_that_it_is_gone(server: Running, client: Client) -> None:
    client.add_node("n1")
    client.add_node("n2")
    server.lose_history()
    with client.watch("/api/v1/nodes?watch=true&resourceVersion=1&timeoutSeconds=20") as events:
        event = next(events)
        assert event["type"] == "ERROR"
        assert (event["object"]["kind"], event["object"]["code"]) == ("Status", 410)
        assert event["object"]["message"].startswith("too old resource version: 1 (")
        assert list(events) == []


def test_a_strategic_patch_of_the_status_merges_conditions_by_type_and_writes_annotations(client: Client) -> None:
    client.add_node("n1", "10.244.1.0/24", {"kept": "1", "gone": "1"})
    client.set_condition("n1", "Ready", "True")
    body = {
        "metadata": {"annotations": {"new": "x", "gone": None}},
        "spec": {"unschedulable": True},
        "status": {"conditions": [{"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp"}]},
    }
    node = patch(client, "/api/v1/nodes/n1/status", body)
    annotations = node["metadata"]["annotations"]
    assert (annotations["kept"], annotations["new"]) == ("1", "x")
    assert "gone" not in annotations
    assert {it["type"]: it["status"] for it in node["status"]["conditions"]} == {
        "Ready": "True",
        "NetworkUnavailable": "False",
    }
    # The specification is not of the status.
    assert "unschedulable" not in node["spec"]
    body["status"]["conditions"][0]["status"] = "True"  # type: ignore[index]
    node = patch(client, "/api/v1/nodes/n1/status", body)
    assert [it["status"] for it in node["status"]["conditions"] if it["type"] == "NetworkUnavailable"] == ["True"]
    assert client.get("/api/v1/nodes/n1") == node


def test_a_merge_patch_replaces_lists(client: Client) -> None:
    client.add_node("n1")
    client.set_condition("n1", "Ready", "True")
    body = {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True"}]}}
    node = patch(client, "/api/v1/nodes/n1/status", body, MERGE)
    assert [it["type"] for it in node["status"]["conditions"]] == ["NetworkUnavailable"]


def test_a_patch_of_the_node_leaves_its_status(client: Client) -> None:
    client.add_node("n1")
    client.set_condition("n1", "Ready", "True")
    body = {"metadata": {"annotations": {"a": "1"}}, "status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    node = patch(client, "/api/v1/nodes/n1", body)
    assert node["metadata"]["annotations"]["a"] == "1"
    assert client.condition("n1", "Ready")["status"] == "True"  # type: ignore[index]


def test_a_patch_that_changes_nothing_writes_nothing(client: Client) -> None:
    client.add_node("n1", annotations={"a": "1"})
    before = client.get("/api/v1/nodes/n1")["metadata"]["resourceVersion"]
    node = patch(client, "/api/v1/nodes/n1/status", {"metadata": {"annotations": {"a": "1"}}})
    assert node["metadata"]["resourceVersion"] == before


def test_a_pod_cidr_can_be_given_and_never_changed(client: Client) -> None:
    client.add_node("n1")
    patch(client, "/api/v1/nodes/n1", {"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}})
    body = {"spec": {"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"]}}
    answer = client.ask("PATCH", "/api/v1/nodes/n1", body, STRATEGIC)
    assert (answer.status, answer.value["reason"]) == (422, "Invalid")


def test_a_patch_of_an_old_version_is_a_conflict(client: Client) -> None:
    client.add_node("n1")
    old = client.get("/api/v1/nodes/n1")["metadata"]["resourceVersion"]
    client.annotate("n1", {"a": "1"})
    body = {"metadata": {"resourceVersion": old, "annotations": {"a": "2"}}}
    answer = client.ask("PATCH", "/api/v1/nodes/n1/status", body, STRATEGIC)
    assert (answer.status, answer.value["reason"]) == (409, "Conflict")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
def test_a_node_that_is_not_there_is_not_found(client: Client, method: str) -> None:
    path = "/api/v1/nodes/nobody" + ("/status" if method == "PATCH" else "")
    answer = client.ask(method, path, {} if method == "PATCH" else None, STRATEGIC)
    assert (answer.status, answer.value["reason"]) == (404, "NotFound")
    assert answer.value["message"] == 'nodes "nobody" not found'
    assert answer.headers["Content-Type"] == "application/json"


def test_a_node_that_is_there_cannot_be_created_again(client: Client) -> None:
    client.add_node("n1")
    body = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1"}}
    answer = client.ask("POST", "/api/v1/nodes", body)
    assert (answer.status, answer.value["reason"]) == (409, "AlreadyExists")


def test_who_is_unknown_is_unauthorized_and_who_may_not_is_forbidden(server: Running, client: Client) -> None:
    client.add_node("n1")
    answer = Client(server.url, "wrong", server.ca).ask("GET", "/api/v1/nodes")
    assert (answer.status, answer.value["reason"], answer.value["kind"]) == (401, "Unauthorized", "Status")
    poor = Client(server.url, POOR_TOKEN, server.ca)
    assert poor.get("/api/v1/nodes/n1")["metadata"]["name"] == "n1"
    for method, path in (("GET", "/api/v1/nodes"), ("PATCH", "/api/v1/nodes/n1/status")):
        answer = poor.ask(method, path, {} if method == "PATCH" else None, STRATEGIC)
        assert (answer.status, answer.value["reason"]) == (403, "Forbidden")
        assert "is forbidden: User" in answer.value["message"]


def test_a_patch_of_an_unknown_kind_is_refused(client: Client) -> None:
    client.add_node("n1")
    answer = client.ask("PATCH", "/api/v1/nodes/n1", {}, "text/plain")
    assert answer.status == 415


@pytest.mark.skipif(not HAS_KUBECTL, reason="needs kubectl")
@pytest.mark.parametrize("server", ["tls", "real"], indirect=True)
def test_kubectl_gets_annotates_and_watches_nodes(server: Running, client: Client, tmp_path: Path) -> None:
    """kubectl sends no token without TLS."""
    assert server.ca is not None
    client.add_node("n1", "10.244.1.0/24")
    config = write_kubeconfig(tmp_path / "config", server.url, ca=server.ca)
    assert kubectl(config, "get", "nodes", "-o", "name") == "node/n1\n"
    assert kubectl(config, "get", "node", "n1", "-o", "jsonpath={.spec.podCIDR}") == "10.244.1.0/24"
    # As the daemon says to those whose nodes have no podCIDR.
    client.add_node("n2")
    kubectl(config, "patch", "node", "n2", "-p", "spec: {podCIDR: 10.244.2.0/24}")
    assert client.get("/api/v1/nodes/n2")["spec"]["podCIDR"] == "10.244.2.0/24"
    client.delete("n2")
    command = ["kubectl", f"--kubeconfig={config}", "get", "nodes", "-o", "name", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:
            assert watching.stdout.readline() == "node/n1\n"
            kubectl(config, "annotate", "node", "n1", "flannel.alpha.coreos.com/public-ip-overwrite=192.0.2.1")
            assert watching.stdout.readline() == "node/n1\n"
        finally:
            watching.kill()
    annotations = client.get("/api/v1/nodes/n1")["metadata"]["annotations"]
    assert annotations["flannel.alpha.coreos.com/public-ip-overwrite"] == "192.0.2.1"
