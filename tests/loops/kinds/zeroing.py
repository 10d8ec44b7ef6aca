"""What a loop may do to have other gradients than the last backward made: zero, drop and accumulate them."""

from tests.loops.registry import adam, kind
from tests.loops.run import Run


@kind("gradient thrown away by zero_grad and continue", keeps_promise=False)
def dropped(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        (r.loss(number) * (1000 if number in (1, 3) else 1)).backward()
        if number in (1, 3):
            r.optimizer.zero_grad()
            continue
        r.optimizer.step()


@kind("one worker throws batches away, the other does not", keeps_promise=False, workers=(2,))
def dropped_by_one(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        (r.loss(number) * (1000 if number in (1, 3) else 1)).backward()
        if r.rank == 1 and number in (1, 3):
            r.optimizer.zero_grad()
            continue
        r.optimizer.step()


@kind("one worker steps without a gradient, the other with one", keeps_promise=False, workers=(2,))
def empty_by_one(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        r.loss(number).backward()
        if r.rank == 1 and number in (1, 3):
            r.optimizer.zero_grad()
        r.optimizer.step()


@kind("zero_grad(set_to_none=False)")
def zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)


@kind("model.zero_grad()")
def by_model(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.model.zero_grad()


@kind("model.zero_grad(set_to_none=False)")
def by_model_zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.model.zero_grad(set_to_none=False)


@kind("p.grad = None")
def set_to_none(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad = None


@kind("del p.grad")
def deleted(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            del parameter.grad


@kind("p.grad.zero_()")
def zeroed_in_place(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.zero_()


@kind("p.grad.data.zero_() and detach_()")
def zeroed_in_data(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.detach_()
            parameter.grad.data.zero_()


@kind("gradients are never zeroed")
def never_zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()


@kind("gradients are zeroed by a factor", keeps_promise=False)
def decayed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.mul_(0.5)


@kind("two steps with one gradient")
def stepped_twice(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("step without any gradient, first and later", optimizer=adam)
def no_gradient(r: Run) -> None:
    r.optimizer.step()
    r.train(0, 1)
    r.optimizer.step()
    r.train(2)
    r.optimizer.zero_grad(set_to_none=False)
    r.optimizer.step()


@kind("gradients of zero everywhere", optimizer=adam)
def gradients_of_zero(r: Run) -> None:
    r.train(0)
    (0 * r.loss(1)).backward()
    r.optimizer.step()
    r.optimizer.zero_grad()
    r.train(2)


@kind("accumulation by the loop itself", keeps_promise=False)
def accumulated(r: Run) -> None:
    for number in range(6):
        (r.loss(number) / 2).backward()
        if number % 2:
            r.optimizer.step()
            r.optimizer.zero_grad()


@kind("accumulation, then the mean in place", keeps_promise=False)
def accumulated_and_divided(r: Run) -> None:
    for number in range(3):
        for part in range(3):
            r.loss(10 * number + part).backward()
        for parameter in r.model.parameters():
            parameter.grad /= 3
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("accumulate=2 and optimizer.zero_grad()", options={"accumulate": 2})
def two_passes(r: Run) -> None:
    _passes(r, lambda: r.optimizer.zero_grad())


@kind("accumulate=2 and model.zero_grad()", options={"accumulate": 2})
def two_passes_model(r: Run) -> None:
    _passes(r, lambda: r.model.zero_grad())


@kind("accumulate=2 and p.grad = None", options={"accumulate": 2})
def two_passes_none(r: Run) -> None:
    def forget() -> None:
        for parameter in r.model.parameters():
            parameter.grad = None

    _passes(r, forget)


def _passes(r: Run, forget: object) -> None:
    """Two passes are one step of plain torch with the mean of both."""
    assert callable(forget)
    for number in range(3):
        for part in range(2):
            r.loss(10 * number + part).backward()
            if r.is_plain:
                if part:
                    for parameter in r.model.parameters():
                        parameter.grad /= 2
                    r.optimizer.step()
                    forget()
            else:
                r.optimizer.step()
                forget()


@kind("gradient of one layer is dropped before the step", optimizer=adam, keeps_promise=False)
def layer_dropped(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        if number % 2:
            r.model[0].weight.grad = None
        r.optimizer.step()
        r.optimizer.zero_grad()
