"""A hub of one repository on this machine: what huggingface_hub asks of huggingface.co, for clients in tests."""
import http.server
import json
import os
import threading

COMMIT = "0" * 40


def start(repository, folder):
    """Serve a folder as `models/NAME` or `datasets/NAME`. Returns a list that grows by each file downloaded.

    Call it before huggingface_hub is imported, which reads its address, HF_ENDPOINT, only once.
    """
    downloaded = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            name = path.rpartition("/resolve/")[2].partition("/")[2]
            if "/gone" in path:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif f"/{repository.removeprefix('models/')}/" not in path:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                self.answer_json([{"type": "file", "path": n, "size": f.stat().st_size, "oid": "1"}
                                  for n, f in files.items()])
            elif path.startswith("/api/"):
                self.answer_json({"id": repository.partition("/")[2], "sha": COMMIT,
                                  "siblings": [{"rfilename": n} for n in files]})
            elif name in files:
                body = files[name].read_bytes()
                self.answer(200, body, {"Content-Type": "application/octet-stream", "ETag": f'"{name}-{len(body)}"',
                                        "X-Repo-Commit": COMMIT})
                if self.command == "GET":
                    downloaded.append(name)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def answer_json(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status, body, headers):
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    return downloaded
