"""A hub of one repository on this machine: what huggingface_hub asks of huggingface.co, for clients in tests."""
import base64
import http.server
import json
import os
import threading

COMMIT = "0" * 40


def start(repository, folder):
    """Serve a folder as `models/NAME` or `datasets/NAME`. Returns a list that grows by each file downloaded.

    A folder that does not exist is created by a client that uploads; each such request is appended to the list as
    (path, content). Call it before huggingface_hub is imported, which reads its address, HF_ENDPOINT, only once.
    """
    log = []
    objects = {}                             # of Git LFS: {oid: content}
    name_of_model = repository.removeprefix("models/")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            name = path.rpartition("/resolve/")[2].partition("/")[2]
            is_private = ("private", True) in log
            is_known = f"/{name_of_model}/" in f"{path}/" and folder.is_dir()
            if "/gone" in path:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif not is_known or is_private and "Authorization" not in self.headers:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                self.answer_json([{"type": "file", "path": n, "size": f.stat().st_size, "oid": "1"}
                                  for n, f in files.items()])
            elif path.startswith("/api/"):
                self.answer_json({"id": repository.partition("/")[2], "sha": COMMIT, "private": is_private,
                                  "siblings": [{"rfilename": n} for n in files]})
            elif name in files:
                body = files[name].read_bytes()
                self.answer(200, body, {"Content-Type": "application/octet-stream", "ETag": f'"{name}-{len(body)}"',
                                        "X-Repo-Commit": COMMIT})
                if self.command == "GET":
                    log.append(name)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.split("?")[0]
            if "Authorization" not in self.headers:
                self.answer(401, b'{"error": "Invalid username or password."}', {})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer_json({"files": [{"path": n, "shouldIgnore": False, "uploadMode": "lfs"
                                             if n.endswith(".safetensors") else "regular"} for n in names]})
            elif path.endswith("/info/lfs/objects/batch"):
                self.answer_json({"transfer": "basic", "objects": [
                    o | {"actions": {"upload": {"href": f"{os.environ['HF_ENDPOINT']}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]]})
            elif "/commit/" in path:
                for line in body.splitlines():
                    self.commit(**json.loads(line))
                url = f"{os.environ['HF_ENDPOINT']}/{name_of_model}/commit/{COMMIT}"
                self.answer_json({"commitUrl": url, "commitOid": COMMIT})

        def do_PUT(self):
            objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, b"", {})

        def create(self, request):
            assert f"{request['organization']}/{request['name']}" == name_of_model
            created = json.dumps({"url": f"{os.environ['HF_ENDPOINT']}/{name_of_model}"}).encode()
            if folder.is_dir():
                self.answer(409, created, {})            # there is one
                return
            folder.mkdir()
            log.append(("private", request.get("visibility") == "private" or request.get("private", False)))
            self.answer(200, created, {})

        def commit(self, key, value):
            if key == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                (folder / value["path"]).write_bytes(objects[value["oid"]])
            elif key == "deletedFile":
                (folder / value["path"]).unlink()
            log.append((key, value.get("path")))

        def answer_json(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status, body, headers):
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    return log
