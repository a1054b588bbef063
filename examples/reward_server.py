"""A server for `rewards: [{url: "http://127.0.0.1:PORT"}]`; PORT is its argument. Here, short responses earn more."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Rewards(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = [1.0 - len(response) / 1000 for response in batch["responses"]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": rewards}).encode())


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Rewards).serve_forever()
