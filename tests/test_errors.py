import inspect

from stepbatch import errors
from stepbatch.errors import REQUEST_ERRORS, RequestError, StepbatchError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, StepbatchError)]


def test_every_request_error_can_be_found_by_its_code() -> None:
    assert set(REQUEST_ERRORS.values()) == {cls for cls in CLASSES if issubclass(cls, RequestError)}
    assert all(cls.code == code for code, cls in REQUEST_ERRORS.items())


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    for cls in CLASSES:
        if cls in (StepbatchError, RequestError) or not issubclass(cls, RequestError):
            assert cls.__name__ in (errors.__doc__ or "")
        else:
            assert any(line.split()[-3:] == [cls.__name__, str(cls.status), cls.code] for line in lines), cls


def test_faults_of_the_server_are_told_from_faults_of_the_caller() -> None:
    for cls in REQUEST_ERRORS.values():
        assert (cls.type == "server_error") == (cls.status >= 500), cls
