"""What a loop may do with graphs between two steps: several of them, parts, second derivatives, old ones, errors."""

import threading
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.loops.registry import adam, kind
from tests.loops.run import Run


@kind("usual loop")
def usual(r: Run) -> None:
    for number in range(4):
        loss = r.loss(number)
        loss.backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("zero_grad before backward")
def zeroed_first(r: Run) -> None:
    for number in range(4):
        r.optimizer.zero_grad()
        r.loss(number).backward()
        r.optimizer.step()


@kind("two losses, a backward each", keeps_promise=False)
def two_losses(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        r.loss(10 + number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("two losses of one forward, retain_graph", keeps_promise=False)
def retained(r: Run) -> None:
    for number in range(3):
        output = r.model(r.batch(number)[0])
        output.square().mean().backward(retain_graph=True)
        output.abs().mean().backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("several forwards, one backward")
def several_forwards(r: Run) -> None:
    for number in range(3):
        loss = r.loss(number) + 0.5 * r.loss(10 + number)
        loss.backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("forward between backward and step", keeps_promise=False)
def forward_between(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        with torch.no_grad():
            after = r.loss(10 + number).item()
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert after


@kind("ratio of update to weight is logged", keeps_promise=False)
def update_ratio(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        before = [parameter.detach().clone() for parameter in r.model.parameters()]
        r.optimizer.step()
        r.optimizer.zero_grad()
        ratio = sum((p - b).norm().item() for p, b in zip(r.model.parameters(), before, strict=True))
        assert ratio > 0


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic, self.actor = nn.Linear(13, 1), nn.Linear(12, 1)

    def value(self, state: torch.Tensor, action: torch.Tensor) -> Any:
        return self.critic(torch.cat([state, action], 1))


@kind("actor's loss runs through the critic after the critic's backward", model=ActorCritic, keeps_promise=False)
def actor_critic(r: Run) -> None:
    for number in range(4):
        state, _ = r.batch(number)
        (r.model.value(state, state[:, :1]) - 1).square().mean().backward()
        r.model.critic.requires_grad_(False)
        (-r.model.value(state, torch.tanh(r.model.actor(state))).mean()).backward()
        r.model.critic.requires_grad_(True)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("saliency map after training", keeps_promise=False)
def saliency(r: Run) -> None:
    r.train(0, 1, 2)
    inputs = r.batch(3)[0].requires_grad_()
    r.model(inputs).sum().backward()
    saliency = inputs.grad
    r.optimizer.zero_grad()
    assert saliency is not None


@kind("FGSM: the gradient of the inputs, then a step on what it makes of them", keeps_promise=False)
def fgsm(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        inputs.requires_grad_()
        nn.functional.cross_entropy(r.model(inputs), labels).backward()
        assert inputs.grad is not None
        worse = (inputs + 0.1 * inputs.grad.sign()).detach()
        r.optimizer.zero_grad()
        nn.functional.cross_entropy(r.model(worse), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("several backwards add up to one step on the inputs, none on the model", keeps_promise=False)
def inversion(r: Run) -> None:
    r.train(0)
    inputs = r.batch(1)[0].requires_grad_()
    for _ in range(3):
        r.model(inputs).square().sum().backward()
        with torch.no_grad():
            inputs -= 0.01 * inputs.grad
        inputs.grad = None
    r.optimizer.zero_grad()
    r.train(2)


@kind("autograd.grad for a measurement")
def measured(r: Run) -> None:
    for number in range(3):
        gradients = torch.autograd.grad(r.loss(10 + number), list(r.model.parameters()))
        norm = torch.stack([each.norm() for each in gradients]).norm()
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert norm > 0


@kind("gradients come from autograd.grad")
def assigned(r: Run) -> None:
    for number in range(3):
        gradients = torch.autograd.grad(r.loss(number), list(r.model.parameters()))
        for parameter, gradient in zip(r.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        r.optimizer.step()


@kind("gradient penalty: second derivatives")
def penalty(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        inputs.requires_grad_()
        loss = nn.functional.cross_entropy(r.model(inputs), labels)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + slope.square().sum()).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("Hessian-vector product between backward and step", keeps_promise=False)
def hessian(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        parameters = list(r.model.parameters())
        slopes = torch.autograd.grad(r.loss(number), parameters, create_graph=True)
        products = torch.autograd.grad(slopes, parameters, [torch.ones_like(each) for each in slopes])
        curvature = sum(each.sum().item() for each in products)
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert curvature


@kind("backward(create_graph=True), then through the gradients", keeps_promise=False)
def through_gradients(r: Run) -> None:
    for number in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the cycle between parameter and gradient
            r.loss(number).backward(create_graph=True)
        sum(p.grad.square().sum() for p in r.model.parameters()).backward()
        for parameter in r.model.parameters():
            parameter.grad = parameter.grad.detach()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("torch.func.grad of a functional call")
def func_grad(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        parameters = {name: parameter.detach() for name, parameter in r.model.named_parameters()}
        gradients = torch.func.grad(
            lambda values, x=inputs, y=labels: nn.functional.cross_entropy(
                torch.func.functional_call(r.model, values, (x,)), y
            )
        )(parameters)
        for name, parameter in r.model.named_parameters():
            parameter.grad = gradients[name]
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("gradients of single samples by vmap, clipped one by one")
def per_sample(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        parameters = {name: parameter.detach() for name, parameter in r.model.named_parameters()}

        def loss(values: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
            output = torch.func.functional_call(r.model, values, (x.unsqueeze(0),))
            return nn.functional.cross_entropy(output, y.unsqueeze(0))

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
        for name, parameter in r.model.named_parameters():
            parameter.grad = each[name].clamp(-0.05, 0.05).mean(0)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("functional_call with weights of the loop's own", keeps_promise=False)
def functional(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        fast = {name: parameter - 0.1 for name, parameter in r.model.named_parameters()}
        nn.functional.cross_entropy(torch.func.functional_call(r.model, fast, (inputs,)), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("MAML: a step on a copy of the weights, differentiated")
def maml(r: Run) -> None:
    for number in range(3):
        parameters = dict(r.model.named_parameters())
        slopes = torch.autograd.grad(r.loss(number), list(parameters.values()), create_graph=True)
        fast = {name: p - 0.1 * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}
        inputs, labels = r.batch(10 + number)
        nn.functional.cross_entropy(torch.func.functional_call(r.model, fast, (inputs,)), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("Jacobian of the outputs")
def jacobian(r: Run) -> None:
    r.train(0)
    jacobian = torch.func.jacrev(r.model)(r.batch(1)[0][:2])
    r.train(2)
    assert jacobian.shape == (2, 7, 2, 12)


@kind("checkpointed segments, not reentrant")
def checkpointed(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        hidden = checkpoint(r.model[:2], inputs, use_reentrant=False)
        nn.functional.cross_entropy(checkpoint(r.model[2:], hidden, use_reentrant=False), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("checkpointed segments, reentrant")
def checkpointed_reentrant(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        hidden = checkpoint(r.model[:2], inputs.requires_grad_(), use_reentrant=True)
        nn.functional.cross_entropy(checkpoint(r.model[2:], hidden, use_reentrant=True), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("one segment checkpointed twice, reentrant", keeps_promise=False)
def checkpointed_twice(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        inputs.requires_grad_()
        one = checkpoint(r.model, inputs, use_reentrant=True)
        other = checkpoint(r.model, 2 * inputs, use_reentrant=True)
        nn.functional.cross_entropy(one + other, labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("saved tensors packed by hooks")
def packed(r: Run) -> None:
    for number in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            loss = r.loss(number)
        loss.backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("backward through a graph from before the step raises")
def stale(r: Run) -> None:
    r.train(0, 1)
    one, other = r.loss(2), r.loss(3)
    one.backward()
    r.optimizer.step()
    r.optimizer.zero_grad()
    said = ""
    try:
        other.backward()
    except RuntimeError as error:
        said = str(error)[:70]
    r.optimizer.zero_grad()
    assert "has been modified" in said
    r.train(4)


@kind("graph from before the step that needs none of the weights")
def stale_but_good(r: Run) -> None:
    one = r.model[2](torch.ones(3, 33)).sum()
    r.train(0, 1)
    one.backward()
    r.optimizer.step()
    r.optimizer.zero_grad()


@kind("second backward through one graph raises, caught", keeps_promise=False)
def backward_twice(r: Run) -> None:
    for number in range(3):
        loss = r.loss(number)
        loss.backward()
        try:
            loss.backward()
        except RuntimeError as error:
            said = str(error)[:40]
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert said


def _on_threads(*functions: Any) -> None:
    def run(function: Any) -> None:
        torch.set_num_threads(1)  # a thread has a number of its own, which decides how sums round
        function()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@kind("backward on another thread")
def on_a_thread(r: Run) -> None:
    for number in range(3):
        loss = r.loss(number)
        _on_threads(loss.backward)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("forward and backward on two threads at once", keeps_promise=False, workers=(1,), is_observed=False)
def on_two_threads(r: Run) -> None:
    for number in range(3):
        losses = [r.loss(number), r.loss(number)]  # equal, so that the order in which they add up is of no account
        _on_threads(*(loss.backward for loss in losses))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("backward for some parameters, then for the others", keeps_promise=False)
def backward_inputs(r: Run) -> None:
    for number in range(3):
        loss = r.loss(number)
        loss.backward(inputs=list(r.model[2].parameters()), retain_graph=True)
        loss.backward(inputs=list(r.model[0].parameters()))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("backward of a vector with a gradient for it")
def vector(r: Run) -> None:
    for number in range(3):
        output = r.model(r.batch(number)[0])
        output.backward(gradient=torch.full_like(output, 0.01))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("anomaly detection")
def anomaly(r: Run) -> None:
    for number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it is slow
            with torch.autograd.detect_anomaly():
                r.loss(number).backward()
            torch.autograd.set_detect_anomaly(False)  # one switch for the threads of all workers, who may leave it on
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("evaluation between steps, inference_mode")
def evaluated(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.model.eval()
        with torch.inference_mode():
            score = r.loss(10 + number).item()
        r.model.train()
        assert score


@kind("hooks on parameters change the gradient")
def parameter_hooks(r: Run) -> None:
    for parameter in r.model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    r.train(0, 1, 2)


@kind("hooks after accumulation change the gradient in place", keeps_promise=False)
def accumulation_hooks(r: Run) -> None:
    def halve(parameter: Any) -> None:
        parameter.grad.mul_(0.5)

    for parameter in r.model.parameters():
        parameter.register_post_accumulate_grad_hook(halve)
    r.train(0, 1, 2)


@kind("hook on a module's output gradient")
def module_hook(r: Run) -> None:
    r.model[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    r.train(0, 1, 2)


@kind("hook reads the gradients of all in the middle of backward", keeps_promise=False)
def reading_hook(r: Run) -> None:
    seen: list[float] = []
    r.model[0].weight.register_hook(lambda g: seen.append(r.model[2].weight.detach().sum().item()))
    for number in range(3):
        r.loss(number).backward()
        weight = seen[-1]
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert weight


class Fails(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("in backward")


def fail_in_backward(r: Run, number: int) -> None:
    """The last layer gets its gradient, the first one none."""
    r.model[2](Fails.apply(r.model[:2](r.batch(number)[0]))).square().mean().backward()


@kind("error in the middle of backward, caught; the batch is dropped", keeps_promise=False)
def error_dropped(r: Run) -> None:
    for number in range(4):
        try:
            if number % 2:
                fail_in_backward(r, number)
            r.loss(number).backward()
        except ArithmeticError:
            r.optimizer.zero_grad()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("error in the middle of backward, caught; half of the gradients are there", keeps_promise=False)
def error_kept(r: Run) -> None:
    for number in range(4):
        try:
            if number % 2:
                fail_in_backward(r, number)
            r.loss(number).backward()
        except ArithmeticError:
            pass
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("error in backward, and the batch once more", keeps_promise=False)
def error_again(r: Run) -> None:
    for number in range(3):
        try:
            fail_in_backward(r, number)
        except ArithmeticError:
            r.optimizer.zero_grad()
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("error in forward, caught")
def error_in_forward(r: Run) -> None:
    for number in range(3):
        try:
            r.model(torch.ones(3, 5))
        except RuntimeError as error:
            said = str(error)[:20]
        r.train(number)
        assert said


@kind("error in a hook of backward, caught", keeps_promise=False, optimizer=adam)
def error_in_hook(r: Run) -> None:
    def fails(gradient: torch.Tensor) -> None:
        raise ArithmeticError("in a hook")

    for number in range(3):
        handle = r.model[0].weight.register_hook(fails)
        try:
            r.loss(number).backward()
        except ArithmeticError:
            handle.remove()
        r.optimizer.zero_grad()
        r.train(number)


@kind("error between backward and step, caught outside", keeps_promise=False)
def error_between(r: Run) -> None:
    for number in range(4):
        try:
            r.loss(number).backward()
            if number % 2:
                raise ArithmeticError("in a metric")
            r.optimizer.step()
        except ArithmeticError:
            pass
        r.optimizer.zero_grad()
