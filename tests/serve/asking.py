"""Requests to a server."""

import json
import socket
import urllib.error
import urllib.request

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"model": "tiny", "temperature": 0}


def call(url, body=None, method=None, headers=None, data=None):
    """Status, headers and body of a plain request."""
    data = json.dumps(body).encode() if body is not None else data
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=100) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def ask(client, text="Hello", **settings):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(messages=messages, **{**GREEDY, "max_tokens": 12, **settings})


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def stream_socket(server, body, headers=None):
    """A connection that has asked for a chat as a stream."""
    data = json.dumps({**body, "stream": True}).encode()
    headers = {"Host": "x", "Content-Length": len(data), **(headers or {})}
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    connection = socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1])))
    connection.sendall("\r\n".join(lines).encode() + data)
    return connection


def read_all(connection, data=b""):
    """`data` and the rest of a response, or of what there is of it."""
    while not data.endswith(b"\r\n0\r\n\r\n") and (new := connection.recv(1 << 16)):
        data += new
    connection.close()
    return data
