# docker build -t fetal-flax .
# docker run --rm -v "$PWD:/work" fetal-flax predict --input scan.png --pixel-size 0.12 --output out
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[dicom]"
WORKDIR /work
ENTRYPOINT ["fetal-flax"]
