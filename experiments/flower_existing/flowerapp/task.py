"""flowerapp: a Flower / PyTorch app."""

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

CLASSES, FEATURES = 4, 16


class Net(nn.Module):
    """A small network."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(FEATURES, 24)
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def make_examples(seed: int, count: int, mix=None):
    """Points around a centre per class; ``mix`` says how often each class comes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(CLASSES) if mix is None else mix
    labels = torch.multinomial(weights, count, replacement=True, generator=generator)
    return TensorDataset(centres[labels] + 1.5 * torch.randn(count, FEATURES, generator=generator), labels)


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """A client's own examples: 40 to 99 of them, one class more often than the others."""
    mix = torch.ones(CLASSES)
    mix[partition_id % CLASSES] = 5.0
    count = 40 + 37 * partition_id % 60
    train = make_examples(1000 + partition_id, count, mix)
    test = make_examples(2000 + partition_id, 20, mix)
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(test, batch_size=64)


def load_centralized_dataset():
    """Examples for the server."""
    return DataLoader(make_examples(999, 400), batch_size=128)


def train(net, trainloader, epochs, lr):
    """Train the model on the training set."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for features, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(features), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / len(trainloader)


def test(net, testloader):
    """Validate the model on the test set."""
    criterion = nn.CrossEntropyLoss()
    net.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for features, labels in testloader:
            outputs = net(features)
            loss += criterion(outputs, labels).item()
            correct += (outputs.argmax(dim=1) == labels).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)
