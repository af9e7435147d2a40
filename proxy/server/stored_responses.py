"""Responses that are kept: how a later request continues one, and the calls that read and delete them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import JSONResponse
from pydantic import WithJsonSchema
from starlette.convertors import StringConvertor, register_url_convertor

from proxy.errors import BadRequest, PreviousResponseNotFound, ResponseNotFound
from proxy.server.admin_responses import Count, OpenResponseModel, ResponseModel
from proxy.server.api.responses_input import ExpandedInput
from proxy.server.api.responses_reasoning import OWN_ITEM_ID
from proxy.server.api.responses_request import ResponsesTranslation
from proxy.server.api.responses_tools import without_secrets
from proxy.server.api.translation import Translation
from proxy.server.dependencies import AppStateDep, CurrentKey
from proxy.server.openapi import COMMON_ERRORS, client_key, errors
from proxy.storage.client_keys import ClientKey
from proxy.storage.response_store import ResponseStore

Item = Mapping[str, Any]

# Responses to which the items of one request may refer.
MAX_REFERRED = 64


def scope_of(key: ClientKey | None) -> str:
    """Return whose responses a caller sees: those of its key, or those of all who need none."""
    return key.id if key is not None else ""


def record_of(translation: Translation, response: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a request, with all that it continues, and of its answer; no secrets of tools."""
    kept = translation.document.get("input")
    if isinstance(translation, ResponsesTranslation):
        kept = translation.input
    return {"input": [without_secrets(item) for item in _items(kept)], "response": dict(without_secrets(response))}


async def expand(document: Mapping[str, Any], store: ResponseStore, scope: str) -> Mapping[str, Any]:
    """Put into `input` what a request refers to: the conversation that it continues, and single items of others.

    Raises:
        PreviousResponseNotFound: the response is not kept, or belongs to another key.
        BadRequest: an item is not kept.
        ServiceUnavailable: Redis does not answer.
    """
    previous = document.get("previous_response_id")
    stated = document.get("input")
    if not isinstance(stated, str | list | None):
        return document  # the translator says what is wrong with it
    items = _items(stated)
    history: list[Item] = []
    if previous is not None:
        record = await store.get(scope, previous) if isinstance(previous, str) else None
        if record is None:
            message = f"Previous response with id '{str(previous)[:100]}' not found."
            raise PreviousResponseNotFound(message, param="previous_response_id")
        history = _conversation(record)
    elif not any(map(_is_reference, items)):
        return document
    expanded = ExpandedInput([*history, *await _resolve(items, history, store, scope)])
    expanded.kept = len(history)
    return {**document, "input": expanded}


async def _resolve(items: list[Item], history: list[Item], store: ResponseStore, scope: str) -> list[Item]:
    """Replace references by the items that they mean. One to an item of `history` is left out: it is there already."""
    present = {item["id"] for item in history if isinstance(item.get("id"), str)}
    wanted = [str(item.get("id")) for item in items if _is_reference(item)]
    found = await _find([each for each in wanted if each not in present], store, scope)
    resolved: list[Item] = []
    for place, item in enumerate(items):
        if not _is_reference(item):
            resolved.append(item)
        elif (item_id := str(item.get("id"))) not in present:
            # Each once: a short request must not become a long one by one large item.
            if (meant := found.pop(item_id, None)) is None:
                why = "is referred to twice" if wanted.count(item_id) > 1 else "not found"
                raise BadRequest(f"Item with id '{item_id[:100]}' {why}.", param=f"input[{place}].id")
            resolved.append(meant)
    return resolved


async def _find(wanted: Sequence[str], store: ResponseStore, scope: str) -> dict[str, Item]:
    """Return the kept items of these ids.

    The newest response is read first: it is kept with what came before it. Nothing but the wanted items is held.
    """
    missing = set(wanted)
    found: dict[str, Item] = {}
    read: set[str] = set()
    for item_id in reversed(wanted):
        match = OWN_ITEM_ID.fullmatch(item_id)
        response_id = f"resp_{match[1]}" if match else ""
        if item_id not in missing or not match or response_id in read or len(read) == MAX_REFERRED:
            continue
        read.add(response_id)
        record = await store.get(scope, response_id) or {}
        here = {str(item.get("id")): item for item in _conversation(record)}
        found |= {each: here[each] for each in missing.intersection(here)}
        missing -= here.keys()
    return found


def _is_reference(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    return item.get("type") == "item_reference" or (item.get("type") is None and "role" not in item and "id" in item)


def _conversation(record: Mapping[str, Any]) -> list[Item]:
    """Return the items of a record: what was sent, and what was answered."""
    response = record.get("response")
    output = response.get("output") if isinstance(response, Mapping) else None
    return [item for part in (record.get("input"), output) for item in _items(part) if isinstance(item, Mapping)]


def _items(value: Any) -> list[Any]:
    """Return an input as a list of items. A text is what the user says."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return list(value) if isinstance(value, list) else []


class ResponseIdConvertor(StringConvertor):
    """Match the id of a response in a path: any name but those that stand for calls."""

    regex = r"(?!(?:input_tokens|compact)(?:/|$))[^/]+"


register_url_convertor("response", ResponseIdConvertor())

router = APIRouter(
    prefix="/v1/responses",
    tags=["responses"],
    default_response_class=JSONResponse,
    dependencies=[Depends(client_key)],
    responses=COMMON_ERRORS,
)

ResponseId = Annotated[str, Path(), WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"})]


class KeptResponse(OpenResponseModel):
    """A response as OpenAI writes it."""

    id: str
    object: Annotated[str, WithJsonSchema({"const": "response"})]
    output: list[Any]


class DeletedResponse(ResponseModel):
    id: str
    object: Annotated[str, WithJsonSchema({"const": "response"})]
    deleted: bool


class InputItems(ResponseModel):
    object: Annotated[str, WithJsonSchema({"const": "list"})]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.get(
    "/{response_id:response}", summary="A response that is kept", response_model=KeptResponse, responses=errors(404)
)
async def get_response(response_id: ResponseId, state: AppStateDep, key: CurrentKey) -> JSONResponse:
    record = await _record(state.responses, key, response_id)
    return JSONResponse(record["response"])


@router.delete("/{response_id:response}", summary="Forget it", response_model=DeletedResponse, responses=errors(404))
async def delete_response(response_id: ResponseId, state: AppStateDep, key: CurrentKey) -> dict[str, Any]:
    if not await state.responses.delete(scope_of(key), response_id):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


MAX_PAGE = 100


@router.get(
    "/{response_id:response}/input_items",
    summary="What it answered: the input with all that came before",
    response_model=InputItems,
    responses=errors(404),
)
async def list_input_items(
    response_id: ResponseId,
    state: AppStateDep,
    key: CurrentKey,
    limit: Annotated[Count, Query(ge=1, le=MAX_PAGE)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    record = await _record(state.responses, key, response_id)
    items = [dict(each) for each in _listed(record.get("input"), response_id)]
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


async def _record(store: ResponseStore, key: ClientKey | None, response_id: str) -> dict[str, Any]:
    record = await store.get(scope_of(key), response_id)
    if record is None or not isinstance(record.get("response"), dict):
        raise _not_found(response_id)
    return record


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{response_id[:100]}' not found.", param="response_id")


def _listed(items: Any, response_id: str) -> Iterator[Item]:
    """Yield the input's items as OpenAI lists them: each with an id, and messages in parts."""
    for place, item in enumerate(_items(items)):
        if not isinstance(item, Mapping):
            continue
        own_id = item.get("id")
        listed = {**item, "id": own_id if isinstance(own_id, str) else f"item_{response_id}_{place}"}
        if "role" in item and item.get("type") in (None, "message"):
            listed |= {"type": "message", "status": item.get("status") or "completed", "content": _parts(item)}
        yield listed


def _parts(message: Item) -> Sequence[Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return content if isinstance(content, list) else []
    if message.get("role") == "assistant":
        return [{"type": "output_text", "text": content, "annotations": []}]
    return [{"type": "input_text", "text": content}]
