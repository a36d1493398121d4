"""A stand-in for an SGLang server and one for its benchmark, for what can go wrong around them.

Server: PORT MODE. Modes: `well`; `refuses` ends at once with an error; `dies` ends when a benchmark has begun;
`lingers` only logs its end; `wrong` generates other tokens.  Benchmark: URL OUT SECONDS.
"""

SERVER = """
import http.server, json, os, subprocess, sys, threading
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "refuses":
    sys.exit("sglang-dwdp: error: this cannot work here")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def do_GET(self):
        if self.path.startswith("/v1/loads"):
            loads = [
                {"dp_rank": r, "num_waiting_reqs": 3 * r, "num_running_reqs": 1, "num_waiting_uncached_tokens": 7}
                for r in range(2)
            ]
            self.answer({"loads": loads})
        elif self.path == "/server_info":
            self.answer({"internal_states": [{"dwdp": {"rank": r, "exposed_copy_s": 0.5}} for r in range(2)]})
        elif self.path == "/errors":
            self.answer(["", "Traceback\\nServerDisconnectedError" if mode == "lingers" else ""])
        elif self.path == "/begin":
            self.answer({})
            if mode == "dies":
                print("RuntimeError: out of luck", flush=True)
                os._exit(9)
            if mode == "lingers":
                print("Scheduler hit an exception: Traceback\\nRuntimeError: no more memory", flush=True)
        else:
            self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        add = 2 if mode == "wrong" else 1
        self.answer({"output_ids": [token + add for token in body["input_ids"][:4]]})

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

BENCHMARK = """
import json, sys, time, urllib.request
url, out, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
urllib.request.urlopen(url + "/begin").read()
sys.stderr.write("\\r 50%|#####     | 2/4 [00:01<00:01]")
sys.stderr.flush()
time.sleep(seconds)
times = ("ttft", "tpot")
result = {f"{q}_{t}_ms": 10.0 * (i + 1) for i, t in enumerate(times) for q in ("median", "p99")}
result |= {"input_throughput": 1000.0, "output_throughput": 100.0, "duration": 2.0, "completed": 4}
errors = json.load(urllib.request.urlopen(url + "/errors"))
result |= {"generated_texts": ["a", "b"], "itls": [[1.0]], "errors": errors, "ttfts": [0.1, 0.2]}
open(out, "w").write(json.dumps(result) + "\\n")
"""
