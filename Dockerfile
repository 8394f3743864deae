# Untested: no image was built of this file.
#   docker build -t mmdist . && docker run --rm -it mmdist
# `docker run mmdist make test` runs the tests. For a GPU, begin with an image
# that has the CUDA toolkit of the torch in requirements/torch.txt.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
        g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /mmdist
COPY . .
RUN make setup
CMD ["make", "demo"]
