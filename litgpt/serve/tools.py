"""Tools that a model may call: how they are told to it, and how its calls are read."""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from litgpt.serve.errors import bad_request

_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        described: as the client gave them, for chat templates.
        parameters: the JSON schema of the arguments of each, by name.
        forced: names of the tools one of which has to be called (empty: the model decides).
    """

    described: list[dict[str, Any]]
    parameters: dict[str, Any]
    forced: tuple[str, ...] = ()

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Tools | None":
        """The tools of a request (None: it has none, or they must not be called).

        Raises:
            ApiError: naming what is wrong.
        """
        given, choice = body.get("tools"), body.get("tool_choice")
        if not given or choice == "none":
            return None
        if not isinstance(given, list):
            raise bad_request("tools must be a list", "tools")
        parameters = {}
        for i, tool in enumerate(given):
            function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                raise bad_request(f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}', "tools")
            schema = function.get("parameters") or {"type": "object"}
            if not isinstance(schema, dict):
                raise bad_request(f"tools[{i}]: parameters must be a JSON schema", "tools")
            parameters[function["name"]] = schema
        if choice in (None, "auto"):
            return cls(given, parameters)
        if choice == "required":
            return cls(given, parameters, tuple(parameters))
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in parameters:
            raise bad_request('tool_choice must be "none", "auto", "required", or name one of the tools', "tool_choice")
        return cls(given, parameters, (name,))

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a call of one of the forced tools."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": self.parameters[name]},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name in self.forced
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    @property
    def instructions(self) -> str:
        """A system text, for chat templates that have no place for tools."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in self.described)
        return (
            f"You can call these functions:\n{lines}\n"
            'To call one, answer only <tool_call>{"name": NAME, "arguments": {...}}</tool_call>.'
        )

    def calls(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """The text beside the calls (None: there is none), and the calls as OpenAI's API gives them. What is no call of a known tool
        stays text."""
        blocks = _BLOCK.findall(text)
        found = [self._call(block) for block in blocks or [text.strip()]]
        if not all(found):
            return text, []
        rest = _BLOCK.sub("", text).strip() if blocks else ""
        return rest or None, found

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self.parameters:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))  # Llama's word is parameters
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": value["name"], "arguments": arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a conversation, with its calls of tools in its text."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{"name": one.get("name"), "arguments": one.get("arguments")} for one in functions]
    blocks = [f"<tool_call>{json.dumps(one, ensure_ascii=False)}</tool_call>" for one in texts]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": (message["content"] or "") + "".join(blocks)}
