"""Tools of the Responses API as chat functions, and a chat model's calls as calls of those tools.

A chat model knows functions alone. Free-form tools, the shell and the patch tool that a client runs itself become
functions too, and so do the members of a namespace, under joined names. What a provider would run is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from proxy.errors import BadRequest
from proxy.server.api.responses_reasoning import mappings

ToolKind = Literal["function", "custom", "local_shell", "shell", "apply_patch"]

# OpenAI's bound, which other servers share.
MAX_NAME_CHARS = 64

_DIGEST_CHARS = 8

# Of the description of a namespace, in front of that of each member.
MAX_NAMESPACE_CHARS = 1000

_UNUSABLE = re.compile(r"[^A-Za-z0-9_-]")

# Members of a function that a chat server knows, and those that say what it is.
_KNOWN_MEMBERS = frozenset({"type", "name", "description", "parameters", "strict", "function", "format"})


@dataclass(frozen=True, slots=True)
class ClientTool:
    """A tool as the client calls it."""

    kind: ToolKind
    name: str
    namespace: str | None = None


class ToolTable:
    """The tools of one request: as chat functions, and by the names that those have."""

    def __init__(self, tools: Iterable[tuple[str, Any]]) -> None:
        """
        Args:
            tools: each with its path in the client's body.

        Raises:
            BadRequest: a tool is not what the API defines.
        """
        self.chat: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.provider_run: set[str] = set()
        """The types of those that a provider would run."""
        self._chat_names: dict[ClientTool, str] = {}
        self._tools: dict[str, ClientTool] = {}
        checked = [(path, _checked(tool, path)) for path, tool in tools]
        # The client's own names stay; joined names give way.
        self._taken = {
            _definition(tool)["name"] for path, tool in checked if tool["type"] == "function" and _name(tool, path)
        }
        for path, tool in checked:
            self._add(tool, path)
        self._unqualified = self._find_unqualified()

    def chat_name(self, kind: ToolKind, name: str, namespace: str | None = None) -> str:
        """Return the function's name of a tool, be it offered in this request or in an earlier one."""
        known = self._chat_names.get(ClientTool(kind, name, namespace))
        if known is None and namespace is None and name in self._unqualified:
            known = self._chat_names[self._unqualified[name]]
        return known or (_joined(namespace, name) if namespace else name)

    def client_tool(self, chat_name: str) -> ClientTool:
        """Return the tool that a model means. Models also leave out the namespace, or make names up."""
        known = self._tools.get(chat_name) or self._unqualified.get(chat_name)
        return known or ClientTool("function", chat_name)

    def has(self, kind: ToolKind, name: str, namespace: str | None = None) -> bool:
        known = ClientTool(kind, name, namespace) in self._chat_names
        return known or (namespace is None and name in self._unqualified)

    def _add(self, tool: Mapping[str, Any], path: str) -> None:
        kind = tool["type"]
        if kind == "namespace":
            namespace = _name(tool, path)
            members = tool.get("tools")
            for place, member in enumerate(members if isinstance(members, list) else ()):
                inner = f"{path}.tools[{place}]"
                member = _checked(member, inner)
                if member["type"] in ("function", "custom"):
                    self._add_function(member, inner, ClientTool(member["type"], _name(member, inner), namespace), tool)
                else:
                    self._leave_out(member, inner)
        elif kind in ("function", "custom"):
            self._add_function(tool, path, ClientTool(kind, _name(tool, path)))
        elif kind in _CLIENT_RUN and not _is_hosted(tool):
            client = ClientTool(kind, kind)
            if client not in self._chat_names:
                self._register(client, {"name": self._free_name(kind, client), **_CLIENT_RUN[kind]})
        else:
            self._leave_out(tool, path)

    def _add_function(
        self, tool: Mapping[str, Any], path: str, client: ClientTool, namespace: Mapping[str, Any] | None = None
    ) -> None:
        if client in self._chat_names:  # given twice: models and servers would not tell them apart
            return
        definition = _definition(tool)
        wanted = client.name if client.namespace is None else _joined(client.namespace, client.name)
        is_own_name = client.kind == "function" and client.namespace is None
        function: dict[str, Any] = {"name": wanted if is_own_name else self._free_name(wanted, client)}
        if description := _description(definition, namespace):
            function["description"] = description
        if client.kind == "custom":
            function["parameters"] = _FREE_FORM
        else:
            parameters = definition.get("parameters")
            function["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
            if definition.get("strict") is not None:
                function["strict"] = definition["strict"]
        self.left_out += [
            f"{path}.{name}" for name, value in tool.items() if name not in _KNOWN_MEMBERS and value is not None
        ]
        self._register(client, function)

    def _register(self, client: ClientTool, function: dict[str, Any]) -> None:
        name = function["name"]
        self._taken.add(name)
        self._tools[name] = client
        self._chat_names[client] = name
        self.chat.append({"type": "function", "function": function})

    def _free_name(self, wanted: str, client: ClientTool) -> str:
        name, source = wanted, f"{client.kind} {client.namespace} {client.name}"
        while name in self._taken:
            source = _digest(source)
            name = f"{wanted[: MAX_NAME_CHARS - _DIGEST_CHARS - 1]}_{source}"
        return name

    def _leave_out(self, tool: Mapping[str, Any], path: str) -> None:
        self.left_out.append(f"{path} ({tool['type']})")
        self.provider_run.add(tool["type"])

    def _find_unqualified(self) -> dict[str, ClientTool]:
        """Return the members of namespaces whose own name no other tool has."""
        found: dict[str, ClientTool] = {}
        ambiguous: set[str] = set()
        for tool in self._chat_names:
            if tool.namespace is None or tool.name in found:
                ambiguous.add(tool.name)
            else:
                found[tool.name] = tool
        return {name: tool for name, tool in found.items() if name not in ambiguous}


def _checked(tool: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise BadRequest(f"`{path}` must be an object", param=path)
    if not isinstance(tool.get("type"), str):
        raise BadRequest(f"`{path}.type` must name the type of the tool", param=f"{path}.type")
    return tool


def _definition(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return where a function is described: in the tool itself, or below `function`, as chat clients write it."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _name(tool: Mapping[str, Any], path: str) -> str:
    name = _definition(tool).get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"`{path}.name` must be the name of the tool", param=f"{path}.name")
    return name


def _is_hosted(tool: Mapping[str, Any]) -> bool:
    """Return whether a shell is one in a container of the provider."""
    environment = tool.get("environment")
    return isinstance(environment, Mapping) and environment.get("type") != "local"


def _joined(namespace: str, name: str) -> str:
    joined = _UNUSABLE.sub("_", f"{namespace}__{name}")
    if len(joined) <= MAX_NAME_CHARS:
        return joined
    return f"{joined[: MAX_NAME_CHARS - _DIGEST_CHARS - 1]}_{_digest(f'{namespace}__{name}')}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARS]


def _description(tool: Mapping[str, Any], namespace: Mapping[str, Any] | None) -> str:
    """Describe a function, with what the client says of its namespace and of the form of its input."""
    texts = [(namespace or {}).get("description"), tool.get("description")]
    if isinstance(texts[0], str):  # each member repeats it
        texts[0] = texts[0][:MAX_NAMESPACE_CHARS]
    form = tool.get("format")
    if isinstance(form, Mapping) and isinstance(form.get("definition"), str):
        texts.append(f"The input follows this {form.get('syntax', '')} grammar:\n{form['definition']}")
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def _parameters(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


_TEXTS = {"type": "array", "items": {"type": "string"}}

_FREE_FORM = _parameters(
    "input", input={"type": "string", "description": "The whole input of the tool, as plain text."}
)

# Members of tools by which a provider gets into other servers.
_SECRETS = frozenset({"authorization", "headers", "domain_secrets"})


def without_secrets(holder: Any) -> Any:
    """Return a response, or an item of an input, without the secrets in its `tools`; the same object if it has none.

    Functions are left as they are: what they define may have any name.
    """
    tools = holder.get("tools") if isinstance(holder, Mapping) else None
    if not isinstance(tools, list):
        return holder
    safe = [tool if _is_defined_by_client(tool) else _without_members(tool) for tool in tools]
    return holder if safe == tools else {**holder, "tools": safe}


def _is_defined_by_client(tool: Any) -> bool:
    return isinstance(tool, Mapping) and tool.get("type") in ("function", "custom", "namespace")


def _without_members(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_members(inner) for name, inner in value.items() if name not in _SECRETS}
    return [_without_members(inner) for inner in value] if isinstance(value, list) else value


# Tools without a definition, which the client runs itself.
_CLIENT_RUN: Mapping[str, Mapping[str, Any]] = {
    "local_shell": {
        "description": "Run one command on the user's machine, and return its output.",
        "parameters": _parameters(
            "command",
            command={**_TEXTS, "description": "The program and its arguments."},
            working_directory={"type": "string"},
            timeout_ms={"type": "integer"},
        ),
    },
    "shell": {
        "description": "Run shell commands on the user's machine, and return their outputs.",
        "parameters": _parameters(
            "commands",
            commands={**_TEXTS, "description": "Commands for the shell, in order."},
            timeout_ms={"type": "integer"},
            max_output_length={"type": "integer"},
        ),
    },
    "apply_patch": {
        "description": "Create, change or delete one file of the workspace.",
        "parameters": _parameters(
            "operation",
            operation={
                "type": "object",
                "properties": {
                    "type": {"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                    "path": {"type": "string"},
                    "diff": {"type": "string", "description": "A unified diff; not for delete_file."},
                },
                "required": ["type", "path"],
            },
        ),
    },
}

_ID_PREFIXES: Mapping[ToolKind, str] = {
    "function": "fc",
    "custom": "ctc",
    "local_shell": "lsh",
    "shell": "sh",
    "apply_patch": "apc",
}


def item_prefix(kind: ToolKind) -> str:
    return _ID_PREFIXES[kind]


def call_item(tool: ClientTool, item_id: str, call_id: str, arguments: str, status: str) -> dict[str, Any]:
    """Return the item of a call, with arguments as the model wrote them.

    A call of the shell or of the patch tool that is not what those take is returned as a call of a function.
    """
    item = {"id": item_id, "type": f"{tool.kind}_call", "status": status, "call_id": call_id}
    if tool.kind == "custom":
        named = {"type": "custom_tool_call", "name": tool.name, "input": free_form_input(arguments)}
        return {**item, **named, **_namespace(tool)}
    parsed = _parse(arguments)
    if tool.kind == "apply_patch" and _is_operation(operation := parsed.get("operation", parsed)):
        return {**item, "operation": operation, "status": "in_progress" if status == "in_progress" else "completed"}
    if tool.kind == "shell" and _are_texts(parsed.get("commands")):
        return {**item, "action": _picked(parsed, "commands", "timeout_ms", "max_output_length")}
    if tool.kind == "local_shell" and _are_texts(parsed.get("command")):
        action = _picked(parsed, "command", "timeout_ms", "working_directory", "user")
        return {**item, "action": {"type": "exec", "env": _env(parsed.get("env")), **action}}
    return {**item, "type": "function_call", "name": tool.name, "arguments": arguments, **_namespace(tool)}


def free_form_input(arguments: str) -> str:
    """Return the input of a free-form tool: the one text of its arguments, or all that the model wrote."""
    parsed = _parse(arguments)
    if isinstance(text := parsed.get("input"), str):
        return text
    texts = list(parsed.values())
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else arguments


def _namespace(tool: ClientTool) -> dict[str, str]:
    return {} if tool.namespace is None else {"namespace": tool.namespace}


def _parse(arguments: str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _picked(parsed: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: parsed[name] for name in names if parsed.get(name) is not None}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _env(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, Mapping) else {}


def _is_operation(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        return False
    kind = value.get("type")
    return kind == "delete_file" or (kind in ("create_file", "update_file") and isinstance(value.get("diff"), str))


def read_tool_choice(choice: Any, tools: ToolTable) -> tuple[Any, list[dict[str, Any]]]:
    """Return a chat body's `tool_choice`, None if there is nothing to choose, and the tools to choose from.

    Raises:
        BadRequest: the choice demands a tool that no chat model can be given, or that is not offered.
    """
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            allowed = {_chosen(each, tools) for each in mappings(choice.get("tools"))}
            offered = [tool for tool in tools.chat if tool["function"]["name"] in allowed]
            return _mode(choice.get("mode", "auto"), offered, tools), offered
        name = _chosen(choice, tools)
        if name is None:
            kind = str(choice.get("type"))[:MAX_NAME_CHARS]
            message = f"`tool_choice` demands {kind!r}, which only OpenAI's own servers can run"
            raise BadRequest(message, param="tool_choice")
        return {"type": "function", "function": {"name": name}}, tools.chat
    return _mode(choice, tools.chat, tools), tools.chat


def _mode(mode: Any, offered: list[dict[str, Any]], tools: ToolTable) -> Any:
    if mode not in (None, "auto", "none", "required"):
        message = "`tool_choice` must be auto, none, required, or an object that names a tool"
        raise BadRequest(message, param="tool_choice")
    if offered:
        return mode
    if mode == "required":
        lost = f": {', '.join(sorted(tools.provider_run))} cannot be given to it" if tools.provider_run else ""
        raise BadRequest(f"`tool_choice` is required, and no tool is left for the model{lost}", param="tool_choice")
    return None


def _chosen(choice: Mapping[str, Any], tools: ToolTable) -> str | None:
    """Return the function's name of the tool that is chosen. None: a provider would run it."""
    kind: Any = choice.get("type")
    if kind in ("function", "custom"):
        name: Any = _definition(choice).get("name")
        namespace = choice.get("namespace")
        named = isinstance(name, str) and isinstance(namespace, str | None)
        if not named or not tools.has(kind, name, namespace):
            message = f"`tool_choice` names {str(name)[:MAX_NAME_CHARS]!r}, which is not in `tools`"
            raise BadRequest(message, param="tool_choice")
        return tools.chat_name(kind, name, namespace)
    if kind in tuple(_CLIENT_RUN) and tools.has(kind, kind):
        return tools.chat_name(kind, kind)
    return None
