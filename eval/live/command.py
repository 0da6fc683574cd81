"""A live page of running pretrainings and sweeps, on this machine alone.

    python -m eval.live runs/

A server of the standard library on 127.0.0.1: two addresses, the page and its numbers. It reads run folders and
writes nothing. From another machine: `ssh -L 8377:127.0.0.1:8377 HOST`.
"""

import argparse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from periln.eval.arguments.live import check
from periln.eval.live.state import Watch
from periln.runkit.errors import UserError
from periln.runkit.pages import asset, policy
from periln.runkit.process import stop_with_parent

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # under which a page of this server may be asked for


def page(watch: Watch, every: float) -> tuple[str, str]:
    """The page, and the content security policy under which it is served."""
    script = "\n".join(map(asset, ("tables.js", "charts.js", "maps.js", "live.js")))
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = jinja.get_template("live.html.j2").render(
        name=watch.root.resolve().name, style=Markup(asset("page.css")), script=Markup(script), every=every
    )
    return text, policy(script, "'self'")


def server_of(watch: Watch, port: int, every: float) -> ThreadingHTTPServer:
    """A server that is bound, and not yet serving.

    Raises:
        UserError: the port is taken.
    """
    text, allowed = page(watch, every)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site whose name was made to point here would come under that name.
            if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path == "/":
                self.answer(text, "text/html")
            elif self.path == "/state.json":
                try:
                    self.answer(watch.state(), "application/json")
                except UserError as error:
                    self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def answer(self, body: str, kind: str) -> None:
            data = body.encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", allowed)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            try:
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the page was closed meanwhile

        def log_message(self, *args: object) -> None:
            """Nothing: a page asks every few seconds."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {(error.strerror or str(error)).lower()}") from None
    server.daemon_threads = True
    return server


def main(args: argparse.Namespace) -> None:
    stop_with_parent(args.stop_with_parent)
    check(args)
    with server_of(Watch(args.runs), args.port, args.every) as server:
        print(
            f"http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends it; it reads {args.runs} and writes nothing)",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
