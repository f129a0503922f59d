"""A host of MCP Apps in headless Chromium: a web host as in the specification of 2026-01-26, with a sandbox of another origin.

The page, its tool results and everything that it asks for come from the real server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from shutil import which
from typing import Any

from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp.types import TextResourceContents
from playwright.async_api import Browser, Frame, FrameLocator, Page, Route, async_playwright
from pydantic import BaseModel

BROWSER = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOST, SANDBOX = "http://host.test/", "http://sandbox.test/"
# The default for pages that declare no domains; besides, Chromium refuses here to parse any text as HTML.
CSP = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; connect-src 'none'; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "require-trusted-types-for 'script'; trusted-types proxy"
)
HOST_PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const received = [];
let frame, opening;
const post = message => frame.contentWindow.postMessage({ jsonrpc: "2.0", ...message }, "*");
const notify = (method, params) => post({ method, params });
const ask = method => post({ id: "host-1", method, params: {} });
function open(values) {
  opening = values;
  document.documentElement.style.colorScheme = opening.context.theme ?? "light dark";
  frame = document.createElement("iframe");
  Object.assign(frame, { sandbox: "allow-scripts allow-same-origin", src: opening.sandbox });
  Object.assign(frame.style, { border: 0, width: "100%", height: "100px", display: "block" });
  document.body.append(frame);
}
async function answer({ method, params }) {
  if (method === "ui/initialize") {
    const hostInfo = { name: "test-host", version: "1" };
    return { result: { protocolVersion: params.protocolVersion, hostInfo, hostCapabilities: opening.capabilities,
      hostContext: opening.context } };
  }
  if (method === "ping" || method === "ui/update-model-context") return { result: {} };
  if (method === "tools/call" || method === "resources/read") return await window.toServer(method, params);
  return { error: { code: -32601, message: "Method not found" } };
}
addEventListener("message", async ({ source, data }) => {
  if (source !== frame?.contentWindow) return;
  received.push(data);
  switch (data.method) {
    case "ui/notifications/sandbox-proxy-ready":
      return notify("ui/notifications/sandbox-resource-ready", { html: opening.html });
    case "ui/notifications/initialized":
      notify("ui/notifications/tool-input", { arguments: opening.arguments });
      return opening.result && notify("ui/notifications/tool-result", opening.result);
    case "ui/notifications/size-changed":
      frame.style.height = `${data.params.height}px`;
      return;
  }
  if (data.method && data.id !== undefined) post({ id: data.id, ...await answer(data) });
});
</script>"""
PROXY_PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const policy = trustedTypes.createPolicy("proxy", { createHTML: html => html });
let inner;
addEventListener("message", ({ source, data }) => {
  if (source === inner?.contentWindow) return parent.postMessage(data, "*");
  if (source !== parent) return;
  if (data.method !== "ui/notifications/sandbox-resource-ready") return inner.contentWindow.postMessage(data, "*");
  inner = document.createElement("iframe");
  inner.setAttribute("sandbox", "allow-scripts allow-same-origin");
  inner.setAttribute("style", "border:0;width:100%;height:100vh;display:block");
  inner.srcdoc = policy.createHTML(data.params.html);
  document.body.append(inner);
});
parent.postMessage({ jsonrpc: "2.0", method: "ui/notifications/sandbox-proxy-ready", params: {} }, "*");
</script>"""


def on_the_wire(result: BaseModel) -> dict[str, Any]:
    return result.model_dump(mode="json", by_alias=True, exclude_none=True)


class AppHost:
    """One open page. `complaints` collects what the browser reports, and requests to anywhere but the two origins."""

    def __init__(self, page: Page, client: Client) -> None:
        self.page = page
        self.complaints: list[str] = []
        self._client = client

    @property
    def app(self) -> FrameLocator:
        return self.page.frame_locator("iframe").frame_locator("iframe")

    @property
    def app_frame(self) -> Frame:
        return self.page.frames[-1]

    async def open(
        self,
        tool: str,
        arguments: dict[str, Any],
        *,
        gives_result: bool = True,
        context: dict[str, Any] | None = None,
        capabilities: dict[str, Any] | None = None,
    ) -> None:
        """Call a tool, and show its result on the page that its declaration names. Without the result: a call that waits."""
        tools = {listed.name: listed for listed in (await self._client.list_tools()).tools}
        (document,) = (await self._client.read_resource((tools[tool].meta or {})["ui"]["resourceUri"])).contents
        assert isinstance(document, TextResourceContents)
        assert document.mime_type == "text/html;profile=mcp-app"
        opening = {
            "html": document.text,
            "sandbox": SANDBOX,
            "arguments": arguments,
            "result": on_the_wire(await self._client.call_tool(tool, arguments)) if gives_result else None,
            "context": context or {},
            "capabilities": {"serverTools": {}, "serverResources": {}, "updateModelContext": {"text": {}}}
            if capabilities is None
            else capabilities,
        }
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))
        await self.page.expose_function("toServer", self._to_server)
        await self.page.route("**/*", self._serve)
        await self.page.goto(HOST)
        await self.page.evaluate("values => open(values)", opening)
        await self.page.wait_for_function("received.some(message => message.method === 'ui/notifications/initialized')")

    async def notify(self, method: str, params: dict[str, Any]) -> None:
        await self.page.evaluate("([method, params]) => notify(method, params)", [method, params])

    async def received(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of all messages of a method that the page sent."""
        messages: list[dict[str, Any]] = await self.page.evaluate("received")
        return [message["params"] for message in messages if message.get("method") == method]

    async def calls(self, tool: str) -> list[dict[str, Any]]:
        return [call["arguments"] for call in await self.received("tools/call") if call["name"] == tool]

    async def _to_server(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            if method == "tools/call":
                return {"result": on_the_wire(await self._client.call_tool(params["name"], params["arguments"]))}
            return {"result": on_the_wire(await self._client.read_resource(params["uri"]))}
        except MCPError as error:
            return {"error": {"code": -32603, "message": str(error)}}

    async def _serve(self, route: Route) -> None:
        match route.request.url:
            case url if url == HOST:
                await route.fulfill(body=HOST_PAGE, content_type="text/html")
            case url if url == SANDBOX:
                headers = {"content-type": "text/html", "content-security-policy": CSP}
                await route.fulfill(body=PROXY_PAGE, headers=headers)
            case url:
                if not url.endswith("/favicon.ico"):
                    self.complaints.append(url)
                await route.abort()


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def app_host(browser: Browser, client: Client, *, width: int = 800) -> AsyncIterator[AppHost]:
    context = await browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(60_000)
    yield AppHost(await context.new_page(), client)
    await context.close()
