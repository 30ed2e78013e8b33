"""A stand-in for W&B's server on the loopback address, as far as runs and their history go."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Its runs by id: what they were created with, and the values that were sent for them.

    Attributes:
        deleted: ids whose runs were deleted; they are refused, as W&B's server does.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.deleted: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """A run's history without wandb's own values."""
        return [
            {key: value for key, value in row.items() if not key.startswith("_")}
            for row in self.history[run_id]
        ]

    def answer(self, query: str, variables: dict[str, Any]) -> tuple[int, Any]:
        """HTTP status, and data or errors, for a GraphQL request."""
        if "upsertBucket" in query:
            return self._upsert(variables)
        if "RunResumeStatus" in query:
            return 200, {"data": {"model": self._resumed(variables["name"])}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": self.url} for name in variables["files"]]
            created = {"runID": "", "uploadHeaders": [], "files": files}
            return 200, {"data": {"createRunFiles": created}}
        viewer = {
            "id": "1",
            "entity": "me",
            "username": "me",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return 200, {"data": {"viewer": viewer}}

    def _upsert(self, variables: dict[str, Any]) -> tuple[int, Any]:
        run_id = variables["name"]
        if run_id in self.deleted:
            said = f"run me/psap/{run_id} was previously created and deleted; try a new run id"
            return 409, {"errors": [{"message": said, "path": ["upsertBucket"]}]}
        given = {key: value for key, value in variables.items() if value is not None}
        self.created.setdefault(run_id, {}).update(given)
        self.history.setdefault(run_id, [])
        bucket = {"id": run_id, "name": run_id, "historyLineCount": 0, "project": _project()}
        return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}

    def _resumed(self, run_id: str) -> Any:
        if run_id in self.deleted or run_id not in self.created:
            return None
        history = self.history[run_id]
        bucket = {
            "id": run_id,
            "name": run_id,
            "summaryMetrics": json.dumps(self.summary.get(run_id, {})),
            "displayName": run_id,
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {**_project(), "bucket": bucket}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """Keep what a run sends of its files; lines replace those that were there from their offset on."""
        files = sent.get("files") or {}
        if part := files.get("wandb-history.jsonl"):
            lines = [json.loads(line) for line in part["content"]]
            self.history[run_id][part["offset"] :] = lines
        if part := files.get("wandb-summary.json"):
            self.summary[run_id] = json.loads(part["content"][0])
        if sent.get("complete"):
            self.exit_codes[run_id] = sent["exitcode"]


def _project() -> dict[str, Any]:
    return {"id": "p", "name": "psap", "entity": {"id": "e", "name": "me"}}


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self._body()
        self._reply(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            self._reply(*self.server.answer(request["query"], request.get("variables") or {}))
            return
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        self._reply(200, {})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[WandbServer]:
    """The stand-in, answering as long as the context lasts."""
    with WandbServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
