"""Accounts, passwords, mailed links, tokens, roles, export and deletion."""

import time

import pytest
from sqlalchemy import select

from broadsheet.errors import InvalidInput, NotAllowed, NotFound
from broadsheet.feed import people, social
from broadsheet.feed.models import Account, Base, Comment, LibraryItem, Outgoing, Run, Subscription, Token, Vote

SECRET, PASSWORD = "key of the tests", "correct horse battery"


@pytest.fixture
def ada(database):
    return people.sign_up(database, "Ada", "Ada@Example.org", PASSWORD)


@pytest.fixture
def bob(database):
    return people.sign_up(database, "bob", "bob@example.org", "another long password")


def test_signing_up_keeps_a_hash_and_lower_case(database, ada):
    assert (ada.name, ada.email, ada.role) == ("ada", "ada@example.org", "reader")
    assert ada.password.startswith("$argon2id$")
    assert PASSWORD not in ada.password


@pytest.mark.parametrize("key", ["ada", "ADA", " ada@example.org ", "Ada@Example.ORG"])
def test_signing_in_by_name_or_address(database, ada, key):
    assert people.sign_in(database, key, PASSWORD).id == ada.id


@pytest.mark.parametrize(("key", "password"), [("ada", "wrong password"), ("nobody", PASSWORD), ("ada", ""), ("", "")])
def test_wrong_pairs_are_refused_in_the_same_words(database, ada, key, password):
    with pytest.raises(NotAllowed, match=r"^name or password is wrong$"):
        people.sign_in(database, key, password)


def test_an_unknown_name_is_hashed_all_the_same(database, ada, monkeypatch):
    """Equal work, counted rather than timed."""
    checked = []
    verify = people.HASHER.verify

    class Counting:
        def verify(self, hashed, password):
            checked.append(hashed)
            return verify(hashed, password)

        check_needs_rehash = people.HASHER.check_needs_rehash

    monkeypatch.setattr(people, "HASHER", Counting())
    for name in ("ada", "nobody"):
        with pytest.raises(NotAllowed):
            people.sign_in(database, name, "wrong password")
    assert len(checked) == 2
    parameters = [hashed.split("$")[1:4] for hashed in checked]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["", "a b", "-a", "a-", "ä", "x" * 41, "admin", "Operator", "a\nb", "<b>"])
def test_names_that_cannot_be_used(database, name):
    with pytest.raises(InvalidInput):
        people.sign_up(database, name, "x@example.org", PASSWORD)


@pytest.mark.parametrize("email", ["", "x", "x@", "@y", "a@b\nBcc: c@d.e", "a b@c.de", "x@y@z.org"])
def test_addresses_that_cannot_be_used(database, email):
    with pytest.raises(InvalidInput, match="mail address"):
        people.sign_up(database, "eve", email, PASSWORD)


@pytest.mark.parametrize("password", ["", "short", "x" * 1001])
def test_passwords_that_cannot_be_used(database, password):
    with pytest.raises(InvalidInput, match="password"):
        people.sign_up(database, "eve", "eve@example.org", password)


def test_name_and_address_are_taken_once(database, ada):
    with pytest.raises(InvalidInput, match="taken"):
        people.sign_up(database, "ADA", "other@example.org", PASSWORD)
    with pytest.raises(people.AddressTaken):
        people.sign_up(database, "other", "ADA@example.org", PASSWORD)


def test_a_reset_link_works_once_and_confirms_the_address(database, ada):
    link = people.reset_token(database, SECRET, "ada@EXAMPLE.org")
    assert link is not None
    account = people.reset_password(database, SECRET, link, "a brand new password")
    assert account.generation == ada.generation + 1  # all sessions end
    assert people.account(database, ada.id).email_confirmed is not None
    people.sign_in(database, "ada", "a brand new password")
    with pytest.raises(NotAllowed):
        people.sign_in(database, "ada", PASSWORD)
    with pytest.raises(NotAllowed, match="used up"):
        people.reset_password(database, SECRET, link, "yet another password")


def test_no_link_for_an_unknown_address(database, ada):
    assert people.reset_token(database, SECRET, "nobody@example.org") is None
    assert people.reset_token(database, SECRET, "not an address") is None


def test_forged_old_and_foreign_links_are_refused(database, ada, monkeypatch):
    link = people.reset_token(database, SECRET, ada.email)
    with pytest.raises(NotAllowed):
        people.reset_password(database, "another key", link, PASSWORD)
    with pytest.raises(NotAllowed):
        people.reset_password(database, SECRET, link[:-2] + ("AA" if link[-2:] != "AA" else "BB"), PASSWORD)
    with pytest.raises(NotAllowed):  # a link of one purpose does not serve another
        people.confirm_email(database, SECRET, link)
    later = time.time() + people.RESET_SECONDS + 5
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    with pytest.raises(NotAllowed, match="too old"):
        people.reset_password(database, SECRET, link, PASSWORD)


def test_confirming_an_address(database, ada):
    link = people.confirm_email_token(ada, SECRET)
    assert people.confirm_email(database, SECRET, link).email_confirmed is not None
    with database.write() as session:
        session.get(Account, ada.id).email = "moved@example.org"
    with pytest.raises(NotAllowed, match="another address"):
        people.confirm_email(database, SECRET, link)


def test_changing_the_password_asks_for_the_old_one_and_ends_sessions(database, ada):
    with pytest.raises(NotAllowed):
        people.change_password(database, ada.id, "guess", "a brand new password")
    assert people.change_password(database, ada.id, PASSWORD, "a brand new password").generation == 1


def test_a_token_is_shown_once_and_kept_as_a_digest(database, ada):
    token, secret = people.create_token(database, ada.id, " my  laptop ", ("write", "read"))
    assert secret not in (token.digest, token.name)
    assert token.name == "my laptop"
    found = people.account_of_token(database, secret)
    assert found is not None
    assert (found[0].id, found[1]) == (ada.id, ("read", "write"))
    assert people.account_of_token(database, secret + "x") is None
    with database.read() as session:
        assert session.get(Token, token.id).used is not None


def test_a_revoked_token_is_void_and_anothers_cannot_be_revoked(database, ada, bob):
    token, secret = people.create_token(database, ada.id, "t")
    with pytest.raises(NotFound):
        people.revoke_token(database, bob, token.id)
    assert people.account_of_token(database, secret) is not None
    people.revoke_token(database, ada, token.id)
    assert people.account_of_token(database, secret) is None
    assert people.tokens_of(database, ada.id) == []


@pytest.mark.parametrize("scopes", [(), ("admin",), ("read", "sudo")])
def test_wrong_scopes(database, ada, scopes):
    with pytest.raises(InvalidInput):
        people.create_token(database, ada.id, "t", scopes)


def test_signing_in_elsewhere_makes_one_account(database):
    first = people.sign_in_with(database, "github", "17", "Grace@example.org", "Grace Hopper", email_verified=True)
    again = people.sign_in_with(database, "github", "17", "moved@example.org", "Grace", email_verified=True)
    assert first.id == again.id
    assert first.name == "grace-hopper"
    with pytest.raises(NotAllowed):  # there is no password to sign in with
        people.sign_in(database, "grace-hopper", "")


@pytest.mark.parametrize(("theirs", "ours"), [(False, True), (True, False), (False, False)])
def test_an_account_is_not_taken_over_by_an_unproven_address(database, ada, theirs, ours):
    if ours:
        people.confirm_email(database, SECRET, people.confirm_email_token(ada, SECRET))
    with pytest.raises(NotAllowed, match="password"):
        people.sign_in_with(database, "github", "666", ada.email, "ada", email_verified=theirs)


def test_a_proven_address_joins_the_account(database, ada):
    people.confirm_email(database, SECRET, people.confirm_email_token(ada, SECRET))
    joined = people.sign_in_with(database, "github", "1", ada.email, "ada", email_verified=True)
    assert joined.id == ada.id


def test_names_from_elsewhere_that_are_taken_or_odd(database, ada):
    names = [
        people.sign_in_with(database, "github", str(i), f"u{i}@example.org", name, email_verified=True).name
        for i, name in enumerate(["Ada", "ada", "!!!", "root"])
    ]
    assert names == ["ada-2", "ada-3", "reader", "root-2"]


def test_roles(database, ada):
    assert people.set_role(database, "ADA", "editor").role == "editor"
    with pytest.raises(InvalidInput):
        people.set_role(database, "ada", "king")
    with pytest.raises(NotFound):
        people.set_role(database, "nobody", "editor")


def test_export_holds_all_that_is_kept_and_deletion_leaves_nothing(database, ada, bob, paper):
    social.vote(database, ada, paper.id)
    said = social.comment(database, ada, paper.id, "my name is *Ada*")
    answer = social.comment(database, bob, paper.id, "hello", parent_id=said.id)
    shelf = social.create_list(database, ada, "to read")
    social.add_to_list(database, ada, shelf.id, paper.id)
    social.follow(database, ada, "field", "geometry")
    people.create_token(database, ada.id, "laptop")
    with database.write() as session:
        subscription = Subscription(account_id=ada.id, address=ada.email)
        session.add(subscription)
        session.flush()
        session.add(Outgoing(key="k1", subscription_id=subscription.id, address=ada.email))
        session.add(Outgoing(key="k2", address=ada.email))
        session.add(Outgoing(key="k3", address=bob.email))

    exported = people.export_account(database, ada)
    assert exported["email"] == ada.email
    assert exported["votes"][0]["paper_id"] == paper.id
    assert exported["comments"][0]["body"] == "my name is *Ada*"
    assert exported["lists"] == [{"name": "to read", "public": False, "papers": [paper.id]}]
    assert exported["follows"][0]["value"] == "geometry"
    assert exported["tokens"][0]["name"] == "laptop"
    assert "argon2" not in str(exported)
    for table in ("votes", "comments", "reports", "lists", "follows", "tokens", "subscriptions", "identities"):
        assert table in exported

    people.delete_account(database, ada)
    assert people.account(database, ada.id) is None
    with database.read() as session:
        assert session.scalars(select(Vote)).all() == []
        assert session.scalars(select(Token)).all() == []
        assert [row.key for row in session.scalars(select(Outgoing))] == ["k3"]
        kept = session.get(Comment, said.id)
        assert (kept.body, kept.account_id) == ("", None)
        assert kept.deleted is not None
        assert session.get(Comment, answer.id).body == "hello"
        assert [depth for depth, _ in social.comments(session, paper.id)] == [0, 1]
    with pytest.raises(NotFound):
        people.export_account(database, ada)


def test_everything_that_belongs_to_an_account_is_exported(database, ada):
    """A new table that names an account has to be thought of here, or kept out for a reason."""
    with database.write() as session:
        session.add(LibraryItem(account_id=ada.id, paper_id="2407.00886", title="A paper of her own library"))
        session.add(Run(slug="cd-t", account_id=ada.id))
    exported = people.export_account(database, ada)
    assert exported["library"][0]["title"] == "A paper of her own library"
    assert (exported["runs"][0]["slug"], exported["runs"][0]["state"]) == ("cd-t", "queued")
    accounts = Base.metadata.tables["accounts"]
    named = {
        table.name
        for table in Base.metadata.sorted_tables
        if any(key.column.table is accounts for key in table.foreign_keys)
    }
    under = {"library_items": "library", "papers": "submitted"}
    assert {under.get(name, name) for name in named} <= set(exported)


def test_hashing_costs_something():
    """A guess must not be cheap: argon2id with no less memory than OWASP's lowest advice for a single pass."""
    assert people.HASHER.type.name == "ID"
    assert people.HASHER.memory_cost >= 46 * 1024  # KiB
