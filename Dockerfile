# For one machine:   docker build -t webhook-relay .
# For a release:     docs/operations.md, "The image"
#
# The layers are the same, bit for bit, for the same source, VERSION,
# SOURCE_DATE_EPOCH and golang image. So a release pins that image by its digest,
# golang:1.26@sha256:…, which "docker buildx imagetools inspect golang:1.26" prints.

# The toolchain runs on the machine that builds and compiles for the others.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go ./
ARG VERSION=""
ARG TARGETOS
ARG TARGETARCH
ARG TARGETVARIANT
# Neither the directory nor the repository gets into the binary.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} \
    go build -trimpath -buildvcs=false -ldflags="-s -w -X main.release=${VERSION}" -o /image/webhook-relay . && \
    install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt
# The whole tree, directories too, has one time, which COPY keeps.
ARG SOURCE_DATE_EPOCH=0
RUN find /image -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +

FROM scratch
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="webhook-relay" \
      org.opencontainers.image.description="Brings webhooks into clusters that the internet cannot reach" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=build /image/ /
USER 65532:65532
EXPOSE 3000 9000
ENTRYPOINT ["/webhook-relay"]
