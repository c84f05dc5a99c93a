"""Slow, literal transcriptions of the losses: face by face, with no code of the project."""

import math

import torch

Faces = torch.Tensor


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (unit(a) - unit(b)).square().sum().clamp_min(1e-30).sqrt()


def npair_mc(anchors, positives, labels):
    n = len(labels)
    terms = []
    for i in range(n):
        others = [
            torch.exp(anchors[i] @ positives[j] - anchors[i] @ positives[i]) for j in range(n) if labels[j] != labels[i]
        ]
        terms.append(torch.log(1 + sum(others)))
    return sum(terms) / n


def angular(anchors, positives, labels, *, angle_deg=45.0, negatives="all"):
    """Wang 2017 in its batch form: mean over pairs of log(1 + sum exp(4 t <a + p, n> - 2 (1 + t) <a, p>))."""
    t = math.tan(math.radians(angle_deg)) ** 2
    a, p = unit(anchors), unit(positives)
    terms = []
    for i in range(len(labels)):
        total = 1.0
        for j in range(len(labels)):
            if labels[j] != labels[i]:
                for other in [p[j]] if negatives == "positives" else [a[j], p[j]]:
                    total = total + torch.exp(4 * t * (a[i] + p[i]) @ other - 2 * (1 + t) * (a[i] @ p[i]))
        terms.append(torch.log(total))
    return sum(terms) / len(terms)


def softmax(faces, classes, vectors):
    """The cross-entropy of the logits."""
    terms = [-torch.log_softmax(vectors @ f, dim=0)[y] for f, y in zip(faces, classes, strict=True)]
    return sum(terms) / len(terms)


def arcface(faces, classes, vectors, *, scale=64.0, margin_rad=0.5):
    terms = []
    for f, y in zip(faces, classes, strict=True):
        angles = torch.acos(unit(vectors) @ unit(f))
        logits = scale * torch.cos(angles)
        if angles[y] + margin_rad < math.pi:
            own = torch.cos(angles[y] + margin_rad)
        else:
            own = torch.cos(angles[y]) - margin_rad * math.sin(margin_rad)
        logits = torch.stack([scale * own if j == y else logits[j] for j in range(len(vectors))])
        terms.append(-torch.log_softmax(logits, dim=0)[y])
    return sum(terms) / len(terms)


def proxy_nca(faces, classes, vectors, *, scale=1.0, own_in_denominator=False):
    terms = []
    for f, y in zip(faces, classes, strict=True):
        squared = scale * (unit(f) - unit(vectors)).square().sum(dim=1)
        kept = [torch.exp(-squared[j]) for j in range(len(vectors)) if own_in_denominator or j != y]
        terms.append(-torch.log(torch.exp(-squared[y]) / sum(kept)))
    return sum(terms) / len(terms)


def group(faces, classes, vectors, *, is_anchor, iterations, temperature):
    """Elezi 2020: replicator dynamics on softmax answers, by correlations of the embeddings."""
    logits = torch.stack([vectors @ f for f in faces])
    answers = torch.softmax(logits / temperature, dim=1)
    rows = []
    for i, y in enumerate(classes):
        one_hot = torch.zeros(len(vectors), dtype=faces.dtype)
        one_hot[y] = 1.0
        rows.append(one_hot if is_anchor[i] else answers[i])
    answers = torch.stack(rows)
    weights = torch.corrcoef(faces).clamp_min(0)
    for _ in range(iterations):
        support = weights @ answers
        answers = torch.stack([(x * s) / (x * s).sum() for x, s in zip(answers, support, strict=True)])
    refined = [-torch.log(answers[i, y] + 1e-12) for i, y in enumerate(classes)]
    plain = [-torch.log_softmax(logits[i], dim=0)[y] for i, y in enumerate(classes)]
    return sum(refined) / len(refined) + sum(plain) / len(plain)


def contrastive(faces, labels, *, margin=1.0):
    """Means over the pairs whose term isn't 0, of positives and of negatives."""
    near, far = [], []
    for i in range(len(labels)):
        for j in range(len(labels)):
            if i != j:
                d = distance(faces[i], faces[j])
                (near if labels[i] == labels[j] else far).append(
                    d if labels[i] == labels[j] else torch.relu(margin - d)
                )
    return sum(torch.stack(x)[torch.stack(x) > 0].mean() for x in (near, far))


def triplets(faces, labels, chosen, *, margin=0.2):
    """The mean hinge of chosen (anchor, positive, negative) in squared distances."""
    squared = [(distance(faces[a], faces[p]) ** 2, distance(faces[a], faces[n]) ** 2) for a, p, n in chosen]
    return sum(torch.relu(near - far + margin) for near, far in squared) / len(squared)


def semi_hard(faces, labels, *, margin=0.2):
    chosen = []
    for a in range(len(labels)):
        for p in range(len(labels)):
            for n in range(len(labels)):
                if a != p and labels[a] == labels[p] != labels[n]:
                    near, far = distance(faces[a], faces[p]) ** 2, distance(faces[a], faces[n]) ** 2
                    if near < far <= near + margin:
                        chosen.append((a, p, n))
    return chosen


def batch_hard(faces, labels):
    chosen = []
    for a in range(len(labels)):
        same = [p for p in range(len(labels)) if p != a and labels[p] == labels[a]]
        other = [n for n in range(len(labels)) if labels[n] != labels[a]]
        p = max(same, key=lambda p: distance(faces[a], faces[p]).item())
        chosen.append((a, p, min(other, key=lambda n: distance(faces[a], faces[n]).item())))
    return chosen


def lifted(faces, labels, *, margin=1.0):
    """Oh Song 2016: the mean of max(0, J)^2 / 2 over positive pairs."""
    terms = []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            if labels[i] == labels[j]:
                pushes = [
                    torch.exp(margin - distance(faces[of], faces[k]))
                    for of in (i, j)
                    for k in range(len(labels))
                    if labels[k] != labels[i]
                ]
                terms.append(torch.relu(distance(faces[i], faces[j]) + torch.log(sum(pushes))) ** 2 / 2)
    return sum(terms) / len(terms)


def ranked_list(faces, labels, *, alpha=1.2, margin=0.4, temperature=5.0, negative_share=0.5):
    """Each face's own means, as the library has them, then their mean; 1e-5 is added for every face of the batch."""
    terms = []
    for i in range(len(labels)):
        d = [distance(faces[i], faces[j]) for j in range(len(labels))]
        near = [d[j] for j in range(len(labels)) if j != i and labels[j] == labels[i] and d[j] > alpha - margin]
        far = [d[j] for j in range(len(labels)) if labels[j] != labels[i] and d[j] < alpha]
        slack = 1e-5 * len(labels)
        weights = [torch.exp(temperature * (alpha - x)) for x in far]
        pull = sum(x - (alpha - margin) for x in near) / (len(near) + slack)
        push = sum(w * (alpha - x) for w, x in zip(weights, far, strict=True)) / (sum(weights) + slack)
        terms.append((1 - negative_share) * pull + negative_share * push)
    return sum(terms) / len(terms)


def multi_similarity(faces, labels, *, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    terms = []
    for i in range(len(labels)):
        cosines = unit(faces) @ unit(faces[i])
        same = [cosines[j] for j in range(len(labels)) if j != i and labels[j] == labels[i]]
        other = [cosines[j] for j in range(len(labels)) if labels[j] != labels[i]]
        near = [s for s in same if s - epsilon < max(other)]
        far = [s for s in other if s + epsilon > min(same)]
        pull = torch.log(1 + sum(torch.exp(-alpha * (s - base)) for s in near)) / alpha if near else 0.0
        push = torch.log(1 + sum(torch.exp(beta * (s - base)) for s in far)) / beta if far else 0.0
        terms.append(pull + push)
    return sum(terms) / len(terms)
