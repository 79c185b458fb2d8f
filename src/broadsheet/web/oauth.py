"""Sign-in with an account elsewhere (OAuth 2 with PKCE): GitHub and Hugging Face, where they are set up."""

from collections.abc import Callable
from dataclasses import dataclass
from secrets import compare_digest, token_urlsafe
from typing import Any

from authlib.integrations.httpx_client import OAuth2Client
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from fastapi.responses import RedirectResponse, Response
from itsdangerous import BadData, URLSafeTimedSerializer

from broadsheet.errors import NotAllowed, NotFound, SourceError
from broadsheet.feed.settings import Settings
from broadsheet.web.site import Site

COOKIE = "sign-in-elsewhere"
SECONDS = 600


@dataclass(frozen=True)
class Provider:
    """A service that vouches for people.

    ``identity`` asks the service's ``api`` for (subject, mail address, whether it is verified, name).
    """

    name: str
    title: str
    authorize: str
    token: str
    api: str
    scope: str
    identity: Callable[[Any, str], tuple[str, str, bool, str]]


def _github(client: Any, api: str) -> tuple[str, str, bool, str]:
    user = client.get(f"{api}/user").raise_for_status().json()
    addresses = client.get(f"{api}/user/emails").raise_for_status().json()
    primary = next((each for each in addresses if each.get("primary")), {})
    return str(user["id"]), primary.get("email", ""), bool(primary.get("verified")), user["login"]


def _huggingface(client: Any, api: str) -> tuple[str, str, bool, str]:
    user = client.get(f"{api}/userinfo").raise_for_status().json()
    return user["sub"], user.get("email", ""), bool(user.get("email_verified")), user["preferred_username"]


PROVIDERS = {
    "github": Provider(
        "github",
        "GitHub",
        "https://github.com/login/oauth/authorize",
        "https://github.com/login/oauth/access_token",
        "https://api.github.com",
        "read:user user:email",
        _github,
    ),
    "huggingface": Provider(
        "huggingface",
        "Hugging Face",
        "https://huggingface.co/oauth/authorize",
        "https://huggingface.co/oauth/token",
        "https://huggingface.co/oauth",
        "openid profile email",
        _huggingface,
    ),
}


def offered(settings: Settings) -> list[Provider]:
    """The services that the operator has set up."""
    return [provider for provider in PROVIDERS.values() if getattr(settings, f"{provider.name}_client_id")]


def _client(here: Site, name: str) -> tuple[Provider, Any]:
    provider = next((each for each in offered(here.settings) if each.name == name), None)
    if provider is None:
        raise NotFound("this feed does not offer to sign in so")
    client = OAuth2Client(
        getattr(here.settings, f"{name}_client_id"),
        getattr(here.settings, f"{name}_client_secret").get_secret_value(),
        scope=provider.scope,
        redirect_uri=f"{here.base_url}/auth/{name}/callback",
        code_challenge_method="S256",
        timeout=15,
    )
    return provider, client


def _signer(here: Site) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(here.secret, salt="broadsheet.oauth")


def begin(here: Site, name: str, target: str) -> Response:
    """Send the reader to the service, with a state that only this browser can bring back."""
    provider, client = _client(here, name)
    verifier, state = token_urlsafe(48), token_urlsafe(24)
    with client:
        url, _ = client.create_authorization_url(
            provider.authorize,
            state=state,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
        )
    response = RedirectResponse(url, 303)
    kept = _signer(here).dumps([name, state, verifier, target])
    secure = here.base_url.startswith("https://")
    response.set_cookie(COOKIE, kept, max_age=SECONDS, path="/auth", httponly=True, samesite="lax", secure=secure)
    return response


def finish(here: Site, name: str, code: str, state: str, cookie: str) -> tuple[dict[str, Any], str]:
    """Who the service says this is, as arguments of ``people.sign_in_with``; and where the reader wanted to go.

    Raises:
        NotAllowed: the answer belongs to no request of this browser, or no mail address was given.
        SourceError: the service does not answer as it should.
    """
    try:
        asked, expected, verifier, target = _signer(here).loads(cookie, max_age=SECONDS)
    except (BadData, ValueError) as error:
        raise NotAllowed("this sign-in took too long: begin again") from error
    if asked != name or not compare_digest(expected.encode(), state.encode()):
        raise NotAllowed("this sign-in belongs to another request: begin again")
    provider, client = _client(here, name)
    if not code:  # she pressed Cancel there, or the service has closed our door
        raise NotAllowed(f"{provider.title} did not sign you in")
    with client:
        try:
            client.fetch_token(provider.token, code=code, code_verifier=verifier)
            subject, email, verified, login = provider.identity(client, provider.api)
        except Exception as error:  # whatever the service or the network does, the reader can only try again
            raise SourceError(f"{provider.title} did not confirm who you are: try again") from error
    if not email:
        raise NotAllowed(f"{provider.title} gave no mail address: allow it, or sign up here")
    identity = {"provider": name, "subject": subject, "email": email, "name": login, "email_verified": verified}
    return identity, target
