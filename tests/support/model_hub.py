"""A Hugging Face hub on this machine with the files of one folder, for the hub's own client (HF_ENDPOINT)."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(name, folder):
    """Serve a folder as the model `name`; yield the address, and the paths that were requested."""
    requested = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            requested.append(path)
            body, headers = self.found(path)
            self.send_response(200 if body is not None else 404)
            if body is None:
                body, headers = b"{}", {"X-Error-Code": "RepoNotFound"}
            for key, text in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, text)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def found(self, path):
            files = sorted(file for file in Path(folder).iterdir() if file.is_file())
            for tree in (f"/api/models/{name}/tree/{revision}" for revision in ("main", COMMIT)):
                if path == tree:
                    listed = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
                        for file in files
                    ]
                    return json.dumps(listed).encode(), {"Content-Type": "application/json"}
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                made = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
                return json.dumps(made).encode(), {"Content-Type": "application/json"}
            for file in files:
                if path in (f"/{name}/resolve/{revision}/{file.name}" for revision in ("main", COMMIT)):
                    return file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
            return None, {}

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()
