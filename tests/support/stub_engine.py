"""Stands for the engine's process of a batch job: speaks its messages, runs no model.

`python -m tests.support.stub_engine ADDRESS BEHAVIOUR`.
"""

import os
import signal
import sys
import threading
import time

import orjson
import zmq

from sidp_sgl.batch.engine_process import ANSWER, FAILED, PARSED, READY, REQUEST, START, STATUS


def end_with_the_job() -> None:
    os.read(0, 1)
    os._exit(1)


def main(address: str, behaviour: str) -> None:
    threading.Thread(target=end_with_the_job, daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(address)

    def send(kind: bytes, content: object, *body: bytes) -> None:
        socket.send_multipart([kind, orjson.dumps(content), *body])

    if behaviour == "usage":
        send(FAILED, {"reason": "unrecognized arguments: --foo", "usage": True})
        time.sleep(60)
    if behaviour == "no import":
        sys.exit(3)
    send(PARSED, {"--dtype": "auto"})
    assert socket.recv() == START
    if behaviour == "no start":
        send(FAILED, {"reason": "DP rank 0 failed", "usage": False})
        return
    send(READY, None)
    send(STATUS, [{"was": 3, "cas": 1}, 0.5])
    while True:
        kind, *content = socket.recv_multipart()
        if kind != REQUEST:
            break
        line, _ = orjson.loads(content[0])
        send(ANSWER, [line, 200, 5, 7], content[1])
        if behaviour == "killed" and line == 3:
            time.sleep(0.2)  # what was sent is under way
            os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "deaf":
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
