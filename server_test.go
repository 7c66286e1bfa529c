package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

// unread opens the stream at streamURL until the test ends, and leaves what comes
// to the test.
func unread(t testing.TB, rt http.RoundTripper, headers ...string) *http.Response {
	t.Helper()
	resp := must(rt.RoundTrip(requestOf(t.Context(), "GET", streamURL, nil, headers...)))
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// The HTTP surface.

// TestFlood: whoever sends webhooks or guesses tokens cannot fill the log; what is
// counted has no bound.
func TestFlood(t *testing.T) {
	for said, request := range map[string]string{"webhook lost": "POST /webhooks/ci", "webhook refused": "POST /webhooks/status", "subscriber refused": "GET /subscribe/ci"} {
		rigTest(t, []string{"AUTH_TOKEN=secret", "RESPONSE_MODE=status=status", "RESPONSE_TIMEOUT=1s"}, func(t *testing.T, p *pipes, r *rig) {
			time.Sleep(2 * time.Minute) // a fresh server waits for subscribers
			rt := p.transport(t, false) // HTTP/2 would refuse some, which are sent again later
			method, path, _ := strings.Cut(request, " ")
			var senders sync.WaitGroup
			for range 200 {
				senders.Go(func() { post(t.Context(), rt, method, "http://relay.test"+path, "{}") })
			}
			senders.Wait()
			expect(t, said+": lines", len(r.log.lines(said)), hushLines)
			expect(t, said+": counted", total(r.Lost)+total(r.Refused)+total(r.Rejected), 200)
		})
	}
}

// TestRoutes is the route table: what a stranger may try, by what comes of it.
// The relay's own errors are JSON of a fixed text and echo nothing.
func TestRoutes(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 128)
	l := loopback(t)
	r := newRig(t, l)
	for _, tt := range []struct {
		status   int
		message  string // of the relay's error
		allow    string
		requests []string // methods and targets
	}{
		{200, "", "", []string{"POST /webhooks/ci", "POST /webhooks/ci/", "GET /webhooks/ci", "HEAD /webhooks/ci", "OPTIONS /webhooks/ci", "PROPFIND /webhooks/ci"}},
		{200, "", "", []string{"POST /webhooks/ci/push/canary?x=1;y=%zz&&?", "POST /webhooks/ci/a%2Fb//c;d=e/.f/...", "POST http://elsewhere.example/webhooks/ci?x"}},
		{200, "", "", []string{"POST /webhooks/" + long, "POST /webhooks/A.z_0~-", "POST /webhooks/notReady/x"}}, // the last one stopped the legacy server
		{200, "", "", []string{"GET /", "HEAD /?x"}},
		{405, "method not allowed", "GET, HEAD", []string{"POST /"}},
		{405, "method not allowed", "GET", []string{"POST /subscribe/ci", "HEAD /subscribe/ci/", "OPTIONS /subscribe/ci/"}},
		{405, "method not allowed", "POST", []string{"GET /subscribe/ci/responses"}},
		{404, "not found", "", []string{"GET /canary", "GET /live", "POST /webhooks", "POST //webhooks/ci", "POST /Webhooks/ci", "POST /%77ebhooks/ci", "GET /subscribe"}},
		{404, "not found", "", []string{"GET /subscribe/", "GET /subscribe/ci//", "GET /subscribe/ci/canary", "POST /subscribe/ci/responses/", "POST /subscribe/ci/responses/a"}},
		{404, "not found", "", []string{"OPTIONS *"}}, // which net/http would answer with 200
		{400, "invalid report", "", []string{"POST /subscribe/ci/responses"}},
		{400, "invalid channel", "", []string{"POST /webhooks/", "POST /webhooks//ci", "POST /webhooks/..", "POST /webhooks/" + long + "a", "POST /webhooks/c%69"}},
		{400, "invalid channel", "", []string{"POST /webhooks/canary@", "POST /webhooks/\xc3\xbc", "GET /subscribe/canary*", "GET /subscribe/../", "POST /subscribe/canary*/responses"}},
		{400, "invalid path", "", []string{"POST /webhooks/ci/../x", "POST /webhooks/ci/%2e%2E/canary", "POST http://x/webhooks/ci/../y"}}, // pathCases has more
	} {
		for _, request := range tt.requests {
			answer := exchange(t, l.Addr().String(), request+" HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
			method, _, _ := strings.Cut(request, " ")
			resp := must(http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), &http.Request{Method: method}))
			body, want := string(must(io.ReadAll(resp.Body))), ""
			if tt.message != "" && method != "HEAD" {
				want = relayError(tt.status, tt.message)
			}
			if resp.StatusCode != tt.status || body != want && request != "GET /" || resp.Header.Get("Allow") != tt.allow ||
				tt.status >= 400 && resp.Header.Get("Content-Type") != "application/json" || strings.Contains(answer, "canary") {
				t.Errorf("%s: got %q", request, answer)
			}
		}
	}
	expect(t, "subscribers after requests that are none", r.streamCount(), 0)
}

// TestPayloadLimit checks what happens to bodies at the limit, above it and
// short of what was announced, before and after they are read.
func TestPayloadLimit(t *testing.T) {
	l := loopback(t)
	r := newRig(t, l, "SERVER_MAX_PAYLOAD_SIZE_LIMIT=1kb")
	const head, continued = "POST /webhooks/ci HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n", "HTTP/1.1 100 Continue\r\n\r\n"
	body := strings.Repeat("x", 1024)
	tooLarge, incomplete := relayError(413, "payload too large"), relayError(400, "body incomplete")
	for _, tt := range []struct{ name, request, prefix, suffix string }{
		{"at the limit", head + "Content-Length: 1024\r\n\r\n" + body, "HTTP/1.1 200", "\r\n\r\n"},
		{"chunked at the limit", head + "Transfer-Encoding: chunked\r\n\r\n400\r\n" + body + "\r\n0\r\n\r\n", "HTTP/1.1 200", "\r\n\r\n"},
		{"invited", head + "Expect: 100-continue\r\nContent-Length: 1024\r\n\r\n" + body, continued + "HTTP/1.1 200", "\r\n\r\n"},
		{"never invited", head + "Expect: 100-continue\r\nContent-Length: 1025\r\n\r\n", "HTTP/1.1 413", tooLarge},
		{"announced above", head + "Content-Length: 1025\r\n\r\n" + body + "x", "HTTP/1.1 413", tooLarge},
		{"chunked above", head + "Transfer-Encoding: chunked\r\n\r\n401\r\n" + body + "x\r\n0\r\n\r\n", "HTTP/1.1 413", tooLarge},
		{"cut short", head + "Content-Length: 1024\r\n\r\nx", "HTTP/1.1 400", incomplete},
		{"chunked cut short", head + "Transfer-Encoding: chunked\r\n\r\n400\r\nx", "HTTP/1.1 400", incomplete},
		{"chunk malformed", head + "Transfer-Encoding: chunked\r\n\r\nxyz\r\nx\r\n0\r\n\r\n", "HTTP/1.1 400", incomplete},
	} {
		if answer := exchange(t, l.Addr().String(), tt.request); !strings.HasPrefix(answer, tt.prefix) || !strings.HasSuffix(answer, tt.suffix) {
			t.Errorf("%s: got %q", tt.name, answer)
		}
	}
	expect(t, "refused for size, body, and all", []int64{r.Refused["size"].Load(), r.Refused["body"].Load(), total(r.Refused)}, []int64{3, 3, 6})
}

// TestFrameLimit: a body within the limit, whose event would be larger than clients
// take, is refused before any stream gets it. Base64 has four bytes for three.
func TestFrameLimit(t *testing.T) {
	rigTest(t, []string{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=64mb"}, func(t *testing.T, p *pipes, r *rig) {
		rt := p.transport(t, false)
		l := listen(t, rt, streamURL, features...)
		post(t.Context(), rt, "POST", hooksURL, strings.Repeat("\r", lineLimit*3/4)).refused(t, 413, "payload too large")
		post(t.Context(), rt, "POST", hooksURL, strings.Repeat("\r", lineLimit/20)).is(t, 200, "")
		synctest.Wait()
		if events := l.got("message"); len(events) != 1 || len(events[0].data) < lineLimit/15 || r.streamCount() != 1 {
			t.Errorf("%d events arrived on %d streams", len(events), r.streamCount())
		}
	})
}

// TestBodyOfSlowSender checks bounds of the package doc: a body has a minute, a
// report ten seconds, and a sender that stalls is answered and cut.
func TestBodyOfSlowSender(t *testing.T) {
	for path, patience := range map[string]time.Duration{"/webhooks/ci": bodyTimeout, "/subscribe/ci/responses": reportTime} {
		t.Run(path, func(t *testing.T) {
			rigTest(t, nil, func(t *testing.T, p *pipes, _ *rig) {
				conn := p.connect(t)
				begin := time.Now()
				io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: relay\r\nContent-Length: 10\r\n\r\nx")
				answer, _ := io.ReadAll(conn)
				if !bytes.HasPrefix(answer, []byte("HTTP/1.1 400")) {
					t.Errorf("got %q", answer)
				}
				between(t, "cut after", patience, time.Since(begin), patience+5*time.Second)
			})
		})
	}
}

// TestRequestsCost: a request counts besides its bytes, before its end and held; above
// its channel's share of the budget there is 503 at once, and all is given back.
func TestRequestsCost(t *testing.T) {
	const fit = 10
	for name, tt := range map[string]struct {
		sent, kept int  // bytes of each that have come, and at most what each takes
		open       bool // the body has no end
	}{"unfinished": {0, requestCost, true}, "of bodies that stall": {3000, requestCost + 3000, true}, "held": {0, requestCost + holdCost + 400, false}} {
		t.Run(name, func(t *testing.T) {
			relayTest(t, []string{"RESPONSE_MODE=status", fmt.Sprintf("SERVER_HELD_BUFFER=%d", 2*(fit*tt.kept+requestCost/2))}, func(t *testing.T, r *relay) {
				ctx, hangUp := context.WithCancel(t.Context())
				for range fit {
					body, sender := io.Pipe()
					go func() { // ends with the request
						sender.Write(make([]byte, tt.sent))
						if tt.open {
							<-ctx.Done()
						}
						sender.CloseWithError(ctx.Err())
					}()
					go r.rt.RoundTrip(requestOf(ctx, "POST", hooksURL, body))
				}
				synctest.Wait()
				if n := r.budget.Used(); n < fit*requestCost || n > int64(fit*tt.kept) || tt.open && n != int64(fit*tt.kept) {
					t.Errorf("%d bytes are counted", n)
				}
				begin := time.Now()
				told := r.post("ci", "")
				told.refused(t, 503, "too many requests wait")
				expect(t, "told after", told.at.Sub(begin), 0)
				expect(t, "refused for the budget", r.Refused["budget"].Load(), 1)
				hangUp()
				synctest.Wait()
				expect(t, "bytes at the end", r.budget.Used(), 0)
				r.post("ci", "").refused(t, 503, "nobody connected")
			})
		})
	}
}

// TestEncodedBudget: what counts of a body is what its event takes.
func TestEncodedBudget(t *testing.T) {
	relayTest(t, []string{"SERVER_HELD_BUFFER=2mb"}, func(t *testing.T, r *relay) {
		r.post("ci", strings.Repeat("\xff", 850<<10)).refused(t, 503, "too many requests wait")
		r.post("ci", strings.Repeat("x", 850<<10)).is(t, 200, "")
	})
}

// TestAnswersCount: an answer counts while its request is held. Reports have a limit
// of their own, so that held requests cannot keep out the answers that would end them.
func TestAnswersCount(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=response"}, func(t *testing.T, r *relay) {
		one, two := r.listen("ci", features...), r.listen("ci", features...)
		told := r.posted("ci", "{}")
		id, empty := one.next(t, 1).id, r.Held().Bytes
		for _, size := range []int{5000, 7000} { // the first failure is as good as the second
			r.report(one, id, Answer{Status: 500, Body: make([]byte, size)})
			expect(t, "bytes that are counted", r.Held().Bytes-empty, 5000)
		}
		all, _ := r.budget.claim("other", 0)
		all.add(r.budget.Limit)
		defer all.end()
		r.report(two, id, Answer{Status: 201})
		(<-told).is(t, 201, "")
	})
}

// Streams.

// TestStreamBytes holds a stream to the letter: legacy clients end for good at
// anything else. What waits together is one write, and over HTTP/1.1 one chunk: who
// asks for whole chunks, as Python's requests, sees every event the moment it comes.
func TestStreamBytes(t *testing.T) {
	const legacy = "data: {\"headers\":{\"content-length\":\"3\"},\"originalUrl\":\"/webhooks/ci\",\"path\":\"/webhooks/ci\",\"query\":{},\"body\":\"a\\nb\",\"timestamp\":1700000000000}\n\n"
	const message = "event: webhook\ndata: POST /webhooks/ci HTTP/1.1\ndata: Content-Length: 3\ndata: X-Relay-Time: 1700000000000\ndata: X-Relay-Respond: accept\ndata:\ndata: a\ndata: b\n\n"
	const ready, heartbeat = "id: 0\nevent: ready\ndata: {\"heartbeatInterval\":5000}\n\n", "event: heartbeat\ndata: {}\n\n"
	for _, tt := range []struct {
		version, features, event string
		reason                   error  // why it ends
		end                      string // a last chunk: it is complete
	}{
		{"1.1", "", legacy, errShutdown, "0\r\n\r\n"},
		{"1.1", "X-Relay-Features: respond, https, drain\r\n", legacy, errStreamAge, "0\r\n\r\n"},
		{"1.1", "X-Relay-Features: new,http\r\nX-Relay-Features: other\r\n", message, errReplaced, ""},
		{"1.0", "", legacy, errShutdown, ""},
		{"1.0", "X-Relay-Features: http\r\n", message, errRevoked, ""},
	} {
		t.Run(tt.version+" "+tt.features, func(t *testing.T) {
			rigTest(t, nil, func(t *testing.T, p *pipes, r *rig) {
				conn, chunked := p.connect(t), tt.version == "1.1"
				buf := make([]byte, 1<<20)
				next := func() string { // of the writes, which a pipe keeps apart
					n, _ := conn.Read(buf)
					return string(buf[:n])
				}
				form := func(blocks ...string) string {
					all := strings.Join(blocks, "")
					if chunked {
						all = fmt.Sprintf("%08x\r\n%s\r\n", len(all), all)
					}
					return all
				}
				publish := func(id string, body []byte) {
					r.hub.Publish(t.Context(), eventOf("ci", &Webhook{ID: id, Method: "POST", Path: "/webhooks/ci", Body: body, Time: wireTime, Mode: modeAccept}))
					synctest.Wait()
				}
				io.WriteString(conn, "GET /subscribe/ci HTTP/"+tt.version+"\r\nHost: relay\r\nAccept: text/event-stream\r\n"+tt.features+"\r\n")
				head := "HTTP/1.1 200 OK\r\nConnection: close\r\nDate: Sat, 01 Jan 2000 00:00:00 GMT\r\n" +
					"Content-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"
				if chunked {
					head += "Transfer-Encoding: chunked\r\n"
				}
				expect(t, "head", next(), head+"\r\n"+form(ready))
				publish("r-1", []byte("a\nb"))
				expect(t, "event", next(), form("id: r-1\n"+tt.event))
				for _, id := range []string{"r-2", "r-3", "r-4"} { // nobody reads, so that the first one's write lasts
					publish(id, []byte("a\nb"))
				}
				time.Sleep(5 * time.Second)
				synctest.Wait()
				expect(t, "the first of several", next(), form("id: r-2\n"+tt.event))
				expect(t, "what waited", next(), form("id: r-3\n"+tt.event, "id: r-4\n"+tt.event, heartbeat))
				expect(t, "heartbeat", next(), form(heartbeat))
				for i := range 41 {
					publish(fmt.Sprint("r-", i), bytes.Repeat([]byte("x"), burst/16))
				}
				writes := 0
				for events := 0; events < 41; writes++ {
					write := next()
					events += strings.Count(write, "id: ")
					if chunked && !regexp.MustCompile(`^[0-9a-f]{8}\r\n(?s:[^\r]*)\n\n\r\n$`).MatchString(write) {
						t.Errorf("more than one chunk, or less, in %.100q", write)
					}
				}
				expect(t, "writes of three bursts, behind one", writes, 4)
				r.hub.Finish(r.hub.Subscribers()[0], tt.reason)
				expect(t, "end", next(), tt.end)
			})
		})
	}
}

// TestHeartbeat checks that heartbeats come at every interval, whatever else
// is sent, for longer than any timeout of the server.
func TestHeartbeat(t *testing.T) {
	relayTest(t, []string{"SERVER_HEARTBEAT_INTERVAL=2s"}, func(t *testing.T, r *relay) {
		l, begin := r.listen("ci"), time.Now()
		for _, f := range streamHeader {
			expect(t, f[0], l.resp.Header.Get(f[0]), f[1])
		}
		for range 200 {
			time.Sleep(1500 * time.Millisecond)
			r.post("ci", "x").is(t, 200, "")
		}
		time.Sleep(time.Second)
		beats := l.got("heartbeat")
		expect(t, "heartbeats in 300 s, and webhooks", []int{len(beats), len(l.got("message"))}, []int{150, 200})
		for i, e := range beats {
			expect(t, "heartbeat", fmt.Sprint(e.at.Sub(begin), e.data), fmt.Sprint(time.Duration(i+1)*2*time.Second, "{}"))
		}
		expect(t, "ready", l.got("ready")[0].data, `{"heartbeatInterval":2000}`)
	})
}

// TestStreamMaxAge checks that a stream of full age is asked to move and closed
// one handler timeout later, and that only those are asked who asked for it.
func TestStreamMaxAge(t *testing.T) {
	relayTest(t, []string{"SERVER_STREAM_MAX_AGE=60s"}, func(t *testing.T, r *relay) {
		begin := time.Now()
		ours, legacy := r.listen("ci", features...), r.listen("ci")
		end, drains := ours.endedAt(t), ours.got("drain")
		if len(drains) != 1 || drains[0].data != "{}" {
			t.Fatalf("drain %v", drains)
		}
		between(t, "drain after a minute less a tenth at most", 54*time.Second, drains[0].at.Sub(begin), time.Minute)
		expect(t, "closed after drain, by the handler timeout", end.Sub(drains[0].at), 10*time.Second)
		between(t, "legacy stream closed after", 64*time.Second, legacy.endedAt(t).Sub(begin), 70*time.Second)
		expect(t, "drains of the legacy stream", len(legacy.got("drain")), 0)
	})
}

// TestBusyStreamOfAge: a stream whose queue is never empty ends at its age, too.
func TestBusyStreamOfAge(t *testing.T) {
	rigTest(t, []string{"SERVER_STREAM_MAX_AGE=60s"}, func(t *testing.T, p *pipes, r *rig) {
		conn, begin := p.connect(t), time.Now()
		io.WriteString(conn, "GET /subscribe/ci HTTP/1.1\r\nHost: relay\r\n\r\n")
		stop := running(t, func(ctx context.Context) {
			for ; ctx.Err() == nil; time.Sleep(200 * time.Millisecond) {
				r.hub.Deliver(eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci", Body: make([]byte, 8<<10)}))
			}
		})
		for b, err := make([]byte, 1024), error(nil); err == nil; time.Sleep(20 * time.Millisecond) {
			_, err = conn.Read(b)
		}
		between(t, "ended after", 60*time.Second, time.Since(begin), 81*time.Second)
		stop()
		expect(t, "reason", r.endings(), []any{errOverdue.Error()})
	})
}

// TestChattySubscriber checks that a subscriber which sends without end after
// its request is cut, and one that sends a little is not.
func TestChattySubscriber(t *testing.T) {
	rigTest(t, nil, func(t *testing.T, p *pipes, r *rig) {
		conn := p.connect(t)
		go io.Copy(io.Discard, conn)
		io.WriteString(conn, "GET /subscribe/ci HTTP/1.1\r\nHost: relay\r\n\r\nhello")
		io.WriteString(conn, strings.Repeat("x", chatterLimit-5))
		synctest.Wait()
		expect(t, "streams after a little", r.streamCount(), 1)
		io.WriteString(conn, strings.Repeat("x", 20))
		synctest.Wait()
		expect(t, "streams after more", r.streamCount(), 0)
	})
}

// TestEviction ends streams whose peer has stopped reading in the midst of an event:
// the write that hangs then must not outlive its subscriber.
func TestEviction(t *testing.T) {
	for _, tt := range []struct {
		name   string
		queued bool // before the stream has begun
		do     func(r *relay)
		within time.Duration
		reason error // nil: any
	}{
		{"token revoked in the first write", true, func(r *relay) { leaveAll(r.hub, errRevoked) }, 0, errRevoked},
		{"token revoked", false, func(r *relay) { leaveAll(r.hub, errRevoked) }, 0, errRevoked},
		{"first write hangs", true, func(*relay) {}, writeTimeout * 3 / 2, nil},
		{"write hangs", false, func(*relay) {}, writeTimeout * 3 / 2, nil},
		{"shutdown in the first write", true, func(r *relay) { go r.Shutdown() }, 10*time.Second - reserve/2, errOverdue},
		{"shutdown", false, func(r *relay) { go r.Shutdown() }, 10*time.Second - reserve/2, errOverdue},
	} {
		t.Run(tt.name, func(t *testing.T) {
			relayTest(t, []string{"SERVER_SUBSCRIBER_BUFFER=32mb"}, func(t *testing.T, r *relay) {
				event := eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci", Body: bytes.Repeat([]byte{0xff}, 10<<20)})
				defer event.release()
				if tt.queued { // not until its channel is live
					r.hub.Watch = func(string) {}
					go func() {
						synctest.Wait()
						r.hub.Deliver(event)
						r.hub.Confirm("ci")
					}()
				}
				io.ReadFull(unread(t, r.rt).Body, make([]byte, 8))
				synctest.Wait()
				if !tt.queued {
					r.hub.Deliver(event)
					synctest.Wait()
				}
				begin := time.Now()
				tt.do(r)
				<-done(&r.streams)
				expect(t, "ended after", time.Since(begin), tt.within)
				expect(t, "streams", r.streamCount(), 0)
				if tt.reason != nil {
					expect(t, "reason", r.endings(), []any{tt.reason.Error()})
				}
			})
		})
	}
}

// TestEventMemoryIsNotShared: the memory of an event goes to the next one only after
// every stream has written it, at its own pace.
func TestEventMemoryIsNotShared(t *testing.T) {
	relayTest(t, nil, func(t *testing.T, r *relay) {
		streams := []*listener{r.listen("ci"), r.listen("ci", features...), r.listen("ci"), r.listen("ci", features...)}
		unread(t, r.rt) // stalled
		const senders, webhooks = 8, 25
		var sent sync.WaitGroup
		for sender := range senders {
			sent.Go(func() {
				for n := range webhooks {
					name := fmt.Sprintf("%d-%d;", sender, n)
					r.post("ci/"+name, strings.Repeat(name, 1000)).is(t, 200, "")
				}
			})
		}
		sent.Wait()
		synctest.Wait()
		for _, l := range streams {
			arrived := map[string]bool{}
			for _, e := range l.got("message") {
				w := e.webhook(t)
				arrived[w.Path] = true
				if e.id != w.ID || string(w.Body) != strings.Repeat(strings.TrimPrefix(w.Path, "/webhooks/ci/"), 1000) {
					t.Fatalf("event %q of %s has another one's bytes", w.ID, w.Path)
				}
			}
			expect(t, "webhooks that arrived", len(arrived), senders*webhooks)
		}
	})
}

// TestUnreadHTTP2 has a connection that takes nothing any more: its stream ends
// all the same, and so does a server that is leaving.
func TestUnreadHTTP2(t *testing.T) {
	for _, within := range []time.Duration{writeTimeout, 10 * time.Second} {
		rigTest(t, nil, func(t *testing.T, p *pipes, r *rig) {
			conn := p.connect(t)
			defer conn.Close()
			askHTTP2(conn, asked("GET", "/subscribe/ci")...)
			r.hub.Deliver(eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci", Body: make([]byte, 1<<20)}))
			synctest.Wait()
			begin := time.Now()
			if within == writeTimeout {
				leaveAll(r.hub, errRevoked)
			} else {
				r.Shutdown()
				conn.Close() // as its caller does
			}
			<-done(&r.streams)
			between(t, "the stream ended after", 0, time.Since(begin), within+time.Second)
		})
	}
}

// TestStreamsAtOnce: an HTTP/2 connection has so many requests under way and no
// more: whoever has more opens another.
func TestStreamsAtOnce(t *testing.T) {
	rigTest(t, []string{"RESPONSE_MODE=status"}, func(t *testing.T, p *pipes, r *rig) {
		rt := p.transport(t, true)
		told := make(chan outcome)
		for n := range streamsAtOnce + 1 {
			go func() { told <- post(t.Context(), rt, "POST", hooksURL, "") }()
			synctest.Wait()
			expect(t, "requests, and connections", []int{r.Held().Webhooks, len(p.open)}, []int{n + 1, 1 + n/streamsAtOnce})
		}
		for range streamsAtOnce + 1 {
			(<-told).refused(t, 503, "nobody connected")
		}
	})
}

// TestHeaderBounds: a header has so many bytes and so many values, in either
// protocol; above that it is 431, before anything is kept of it. HTTP/2 tells the
// bound beforehand, and counts 32 bytes more for each value.
func TestHeaderBounds(t *testing.T) {
	many := func(n int) []string { return slices.Repeat([]string{"x-a", "1"}, n) }
	long := func(n int) string { return strings.Repeat("x", n) }
	for name, tt := range map[string]struct {
		headers []string
		h1, h2  int
		ours    int64 // refused by the relay, not by net/http
	}{
		"as many values as may be": {many(fieldLimit - 2), 200, 0, 0}, // and two of http.Transport's
		"one value too many":       {many(fieldLimit - 1), 431, 0, 1},
		"values of HTTP/2":         {many(400), 200, 200, 0},
		"a long value":             {[]string{"x-a", long(headerLimit - 1<<10)}, 200, 200, 0},
		"a value too long":         {[]string{"x-a", long(headerLimit + 8<<10)}, 431, 0, 0},
		"several values too long":  {[]string{"x-a", long(headerLimit/2 + 4<<10), "x-b", long(headerLimit/2 + 4<<10)}, 431, 0, 0},
		"a name too long":          {[]string{long(headerLimit + 8<<10), "1"}, 431, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			relayTest(t, nil, func(t *testing.T, r *relay) {
				r.ask("GET", "/", "").is(t, 200, "ok\n")
				got := r.ask("POST", "/webhooks/ci", "", tt.headers...)
				if r.rt.Protocols.HTTP1() {
					expect(t, "status and refused", []int64{int64(got.status), r.Refused["size"].Load()}, []int64{int64(tt.h1), tt.ours})
				} else {
					expect(t, "status", got.status, tt.h2)
				}
			})
		})
	}
}

// TestMethodsOverHTTP2: net/http takes anything for a method there; what is no
// token would be refused by every client.
func TestMethodsOverHTTP2(t *testing.T) {
	rigTest(t, nil, func(t *testing.T, p *pipes, r *rig) {
		for i, method := range []string{"GE T", "PO\xffST", `P"OST`} {
			if _, body := askHTTP2(p.connect(t), asked(method, "/webhooks/ci")...); body != relayError(400, "invalid method") {
				t.Errorf("%q got %q", method, body)
			}
			expect(t, "lines", len(r.log.lines("webhook refused")), i+1)
		}
		p.cut(false)
	})
}

// TestSubscriberLimits: a stream that ends makes place for another.
func TestSubscriberLimits(t *testing.T) {
	for _, limit := range []string{"SERVER_MAX_SUBSCRIBERS=2", "SERVER_MAX_SUBSCRIBERS_PER_ADDRESS=2"} {
		relayTest(t, []string{limit}, func(t *testing.T, r *relay) {
			first := r.listen("ci")
			r.listen("other")
			r.ask("GET", "/subscribe/ci/", "").refused(t, 503, "too many subscribers")
			first.close()
			synctest.Wait()
			r.listen("ci")
		})
	}
}

// TestShutdown ends a server that has everything at once: streams of both kinds, a
// held request that is answered while it ends, one that nobody answers, who comes
// too late. It goes on taking webhooks until the last stream has ended.
func TestShutdown(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=accept, held=status", "RESPONSE_TIMEOUT=1m"}, func(t *testing.T, r *relay) {
		ours, legacy, held := r.listen("ci", features...), r.listen("ci"), r.listen("held", features...)
		answered := r.posted("held", "")
		unanswered := r.posted("held", "")
		r.post("ci", "last").is(t, 200, "")
		begin, over := time.Now(), make(chan time.Duration)
		go func() {
			r.Shutdown()
			over <- time.Since(begin)
		}()
		time.Sleep(2 * time.Second) // longer than the jitter of drain
		expect(t, "ready while shutting down", r.Check(t.Context()), error(errShutdown))
		expect(t, "drains: ours, held, legacy", []int{len(ours.got("drain")), len(held.got("drain")), len(legacy.got("drain"))}, []int{1, 1, 0})
		r.ask("GET", "/subscribe/ci/", "").refused(t, 503, "shutting down")
		r.post("ci", "late").is(t, 200, "")
		synctest.Wait()

		// The report of a client is taken to the end.
		for _, event := range ours.got("message") {
			r.report(ours, event.id, Answer{Status: 202})
		}
		r.ask("POST", "/subscribe/held/responses", reportOf(held.got("message")[0].id, Answer{Status: 201}), "X-Relay-Client", held.client).is(t, 204, "")
		first := <-answered
		first.is(t, 201, "")
		expect(t, "answered after", first.at.Sub(begin), 2*time.Second)
		for l, want := range map[*listener]string{ours: "last late", legacy: "last late", held: " "} {
			between(t, "a stream ended after", 0, l.endedAt(t).Sub(begin), moveJitter+moveTime)
			expect(t, "webhooks of a stream", string(l.next(t, 1).webhook(t).Body)+" "+string(l.next(t, 2).webhook(t).Body), want)
		}
		time.Sleep(100 * time.Millisecond)
		r.post("ci", "too late").refused(t, 503, "shutting down")
		r.post("held", "too late").refused(t, 503, "shutting down")
		last := <-unanswered
		last.refused(t, 503, "shutting down")
		expect(t, "the unanswered ended after what leaves a second for the streams", last.at.Sub(begin), 9*time.Second)
		between(t, "shutdown took", 0, <-over, 10*time.Second)
		expect(t, "lost", total(r.Lost), 0)
	})
}

// TestDrain checks that a server which is about to end works on, and sends
// keep-alive senders to another replica.
func TestDrain(t *testing.T) {
	rigTest(t, nil, func(t *testing.T, p *pipes, r *rig) {
		rt := p.transport(t, false)
		for _, draining := range []bool{false, true} {
			if draining {
				r.Drain()
			}
			resp := must(rt.RoundTrip(requestOf(t.Context(), "POST", hooksURL, nil)))
			if resp.StatusCode != 200 || resp.Close != draining || (r.Check(t.Context()) == nil) == draining {
				t.Errorf("draining %t: %+v", draining, resp)
			}
		}
	})
}

// TestDrainIsSpread: not all clients of a replica that ends come to the others at once,
// and the jitter leaves most of the handler timeout to follow. It ends when all have
// moved, and does not sit out its patience.
func TestDrainIsSpread(t *testing.T) {
	for timeout, jitter := range map[string]time.Duration{"10s": moveJitter, "1s": 125 * time.Millisecond} {
		relayTest(t, []string{"HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=" + timeout}, func(t *testing.T, r *relay) {
			var streams []*listener
			for range 40 {
				l := r.listen("ci", features...)
				streams = append(streams, l)
				go func() { // ends with the stream
					inTime(func() bool { return len(l.got("drain")) > 0 })
					l.close()
				}()
			}
			synctest.Wait()
			begin := time.Now()
			r.Shutdown()
			between(t, "shutdown took", 0, time.Since(begin), jitter+100*time.Millisecond)
			var asked []time.Duration
			for _, l := range streams {
				asked = append(asked, l.got("drain")[0].at.Sub(begin))
				expect(t, "drains", len(l.got("drain")), 1)
			}
			slices.Sort(asked)
			first, last := asked[0], asked[len(asked)-1]
			if n := len(slices.Compact(asked)); last > jitter || last-first < jitter/2 || n < 20 {
				t.Errorf("asked at %d instants between %s and %s, want them spread over %s", n, first, last, jitter)
			}
		})
	}
}

// TestNginx runs streams and webhooks through an nginx that knows nothing of
// them but where to pass them. It buffers answers by default.
func TestNginx(t *testing.T) {
	t.Parallel()
	path := need(t, "nginx", "nginx-light")
	server := startServer(t)
	front := fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0]) // nginx cannot pick a free port itself
	dir := t.TempDir()
	config := "daemon off; worker_processes 1; pid nginx.pid; error_log stderr;\nevents {}\nhttp {\n access_log off;\n"
	if os.Getuid() == 0 {
		config = "user root;\n" + config // its workers must reach dir
	}
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		config += " " + kind + "_temp_path " + kind + ";\n"
	}
	config += " server { listen " + front + "; location / { proxy_pass http://" + server.addr + "; } }\n}\n"
	replace(t, filepath.Join(dir, "nginx.conf"), []byte(config))
	cmd := exec.CommandContext(t.Context(), path, "-p", dir, "-c", "nginx.conf", "-e", "stderr")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Wait() })
	front = "http://" + front
	eventually(t, "nginx listens", func() bool { return post(t.Context(), afresh, "GET", front, "").status == 200 })
	stream := listen(t, afresh, front+"/subscribe/ci/")
	eventually(t, "ready", func() bool { return len(stream.got("ready")) == 1 })
	body := strings.Repeat("0123456789abcdef", 4096) // more than nginx keeps in memory
	post(t.Context(), afresh, "POST", front+"/webhooks/ci/a%2Fb?x=%zz", body).is(t, 200, "")
	w := stream.next(t, 1).webhook(t)
	expect(t, "webhook", w.Path+w.Query+string(w.Body), "/webhooks/ci/a%2Fb?x=%zz"+body)
	expect(t, "heartbeats, which may have pushed the event", len(stream.got("heartbeat")), 0)
	server.cancel()
	<-stream.done
}

// Response modes. The provider's open request is the only queue.

// TestModes is what a provider is told in each mode for what the target says.
func TestModes(t *testing.T) {
	plain, large := says(201, "hello", "Content-Type: text/plain", "Date: then"), strings.Repeat("x", answerLimit)
	const unreachable, late, ours = "target unreachable", "no answer in time", "Content-Type:application/json"
	for _, tt := range []struct {
		name, mode, answer string // the target's raw answer; empty: it is down
		status             int
		body               string
		headers            string // "name: value" that must be there; "name" that must not
	}{
		{"accept", "accept", says(500, "oops"), 200, "", "X-Of Content-Type"},
		{"status", "status", plain, 201, "", "X-Of Content-Type"},
		{"status of a failure", "status", says(404, "no"), 404, "", "X-Of"},
		{"response", "response", plain, 201, "hello", "Content-Type:text/plain X-Of:target Date:then"},
		{"response of a failure", "response", says(422, "no"), 422, "no", "X-Of:target"},
		{"nothing invented", "response", says(200, "<html>"), 200, "<html>", "Content-Type X-Of:target"},
		{"hop-by-hop", "response", says(200, "x", "Connection: X-Hop, keep-alive", "X-Hop: 1", "Keep-Alive: timeout=5", "Upgrade: h2c",
			"Proxy-Authenticate: Basic", "Trailer: X-T", "Set-Cookie: a=b", "X-Relay-Event-Id: forged", "ETag: e"), 200, "x",
			"X-Hop Keep-Alive Upgrade Proxy-Authenticate Trailer Set-Cookie Etag:e"},
		{"repeated", "response", says(200, "x", "Link: a", "Link: b"), 200, "x", "Link:a,b"},
		{"bytes", "response", says(200, "\x00\xff\r\n", "Content-Encoding: gzip"), 200, "\x00\xff\r\n", "Content-Encoding:gzip"},
		{"chunked", "response", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", 200, "abc", "Content-Length:3"},
		{"no content", "response", "HTTP/1.1 204 No Content\r\nX-Of: target\r\n\r\n", 204, "", "X-Of:target Content-Length Content-Type"},
		{"not modified", "response", "HTTP/1.1 304 Not Modified\r\nETag: e\r\n\r\n", 304, "", "Etag:e Content-Length"},
		{"HEAD", "response", "HTTP/1.1 200 OK\r\nX-Of: target\r\nContent-Length: 5\r\n\r\n", 200, "", "X-Of:target Content-Length"},
		{"redirect", "response", says(302, "", "Location: https://elsewhere.example/"), 302, "", "Location:https://elsewhere.example/"},
		{"after 1xx", "response", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + plain, 201, "hello", "Link"},
		{"largest body", "response", says(200, large), 200, large, "X-Of:target"},
		{"body above the cap", "response", says(200, large+"x"), 200, "", "X-Of:target Content-Length:0"},
		{"no HTTP", "response", "hello\r\n\r\n", 502, relayError(502, unreachable), ours},
		{"101", "response", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", 502, relayError(502, unreachable), "Upgrade"},
		{"down", "response", "", 502, relayError(502, unreachable), ours},
		{"down, status", "status", "", 502, relayError(502, unreachable), ours},
		{"down, accept", "accept", "", 200, "", ""},
		{"overloaded", "response", says(503, "later", "Retry-After: 1"), 503, "later", "Retry-After:1 X-Of:target"},
		{"silent", "response", "silent", 504, relayError(504, late), ours},
		{"silent, status", "status", "silent", 504, relayError(504, late), ours},
	} {
		t.Run(tt.name, func(t *testing.T) {
			others := map[bool]string{true: "response", false: "accept"}[tt.mode == "accept"] // the mode is the channel's own
			relayTest(t, []string{"RESPONSE_MODE=" + others + ", ci=" + tt.mode}, func(t *testing.T, r *relay) {
				inner, to := newPipes(), &target{got: make(chan recorded, 100), answer: func(recorded) string {
					if tt.answer == "silent" {
						time.Sleep(time.Minute)
					}
					return tt.answer
				}}
				to.wg.Go(func() {
					for conn, err := inner.Accept(); err == nil; conn, err = inner.Accept() {
						to.wg.Go(func() {
							defer conn.Close()
							to.serve(conn)
						})
					}
				})
				c := newClientOf(t, streamURL, "http://target.test")
				c.source.Proxy, c.target.Proxy = nil, nil
				c.source.DialContext, c.target.DialContext = r.p.dial, inner.dial
				t.Cleanup(func() { // once it has ended
					r.p.cut(true)
					inner.cut(true)
					inner.Close()
					to.wg.Wait()
				})
				running(t, c.Run)
				eventually(t, "ready", func() bool { return c.Check(t.Context()) == nil })
				inner.cut(tt.answer == "")
				begin, method := time.Now(), "POST"
				if tt.name == "HEAD" {
					method = tt.name
				}
				got := r.ask(method, "/webhooks/ci", "{}")
				got.is(t, tt.status, tt.body)
				if reason := map[string]string{relayError(502, unreachable): "unreachable", relayError(504, late): "timeout"}[tt.body]; reason != "" {
					expect(t, "refused as "+reason, r.Refused[reason].Load(), 1)
				}
				between(t, "took", 0, time.Since(begin), 9*time.Second)
				if ids := got.header["X-Relay-Event-Id"]; len(ids) != 1 || replicaOf(ids[0]) != testReplica {
					t.Errorf("X-Relay-Event-Id %q", ids)
				}
				for field := range strings.FieldsSeq(tt.headers) {
					name, value, _ := strings.Cut(field, ":")
					expect(t, name, strings.Join(got.header[name], ","), value)
				}
			})
		})
	}
}

// TestPrivateHeaders: nothing of an answer, whoever reports it and however it is spelt,
// speaks to the relay's proxy or changes a browser's mind about the relay's host.
func TestPrivateHeaders(t *testing.T) {
	const dropped = "X-Accel-Redirect x-ACCEL-anything X-Sendfile x-sendfile-type Strict-Transport-Security Clear-Site-Data Alt-Svc Service-Worker-Allowed refresh "
	const browsers = "Access-Control-Allow-Origin ACCESS-control-max-age Access-Control-Expose-Headers "
	const kept = "Content-Type Location Etag Vary Www-Authenticate Content-Security-Policy X-Accelerate X-Send Strict-Transport Alt-Svc-Other Access-Controlled "
	for _, tt := range []struct {
		more   string
		origin []string
		want   string // and its own
		cache  string
	}{
		{"", nil, kept, "no-store"},
		{"", []string{"Origin", "https://a.example"}, kept + browsers, "no-store"},
		{"", []string{"Origin", "null"}, kept + browsers, "no-store"},
		{"Cache-Control X-Content-Type-Options", nil, kept, "1"},
	} {
		relayTest(t, []string{"RESPONSE_MODE=response"}, func(t *testing.T, r *relay) {
			client := r.listen("ci", features...)
			told := r.posted("ci", "{}", tt.origin...)
			answer, want := Answer{Status: 200}, http.Header{"Cache-Control": {tt.cache}, "X-Content-Type-Options": {"nosniff"}}
			for name := range strings.FieldsSeq(dropped + browsers + kept + tt.more) {
				answer.Headers = append(answer.Headers, Header{name, []string{"1"}})
			}
			for name := range strings.FieldsSeq(tt.want) {
				want.Set(name, "1")
			}
			r.report(client, client.next(t, 1).id, answer)
			got := (<-told).header
			for _, name := range []string{"Date", "Content-Length", "X-Relay-Event-Id"} {
				want[name] = got[name]
			}
			expect(t, "header", got, want)
		})
	}
}

// stubBus is a hub that publishes in another way; with err, nothing is sent over it.
type stubBus struct {
	*Hub
	publish func(context.Context, *Event) (int, error)
	err     error
}

func (b stubBus) Publish(ctx context.Context, e *Event) (int, error) { return b.publish(ctx, e) }

func (b stubBus) Send(ctx context.Context, sig Signal) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	return b.Hub.Send(ctx, sig)
}

var outcomeSample = regexp.MustCompile(`(?m)^relay_((?:webhooks_total|subscribers_refused_total)\{.*\}) (\d+)$`)

// TestRefusalsAreTold: every refusal that a stranger can cause is one line, of its
// level and with its reason, and one in the metrics, under its label and no other.
func TestRefusalsAreTold(t *testing.T) {
	const (
		hook, report, stream = "WARN webhook refused", "WARN report refused", "WARN subscriber refused"
		misled, browsed      = "WARN request refused", "INFO request refused"
		reports              = "/subscribe/ci/responses"
	)
	token, elsewhere := []string{"X-Auth-Token", "secret"}, []string{"X-Auth-Token", "secret", "X-Forwarded-For", "198.51.100.1"}
	many, said := slices.Repeat([]string{"X-Many", "canary"}, fieldLimit+1), reportOf(testID, Answer{Status: 200})
	ended := func(r *rig) { r.Shutdown() }
	wait := func(r *rig) { time.Sleep(time.Minute) }
	kept := func(r *rig) { r.hub.Watch = func(string) {} } // nothing becomes live by itself
	for _, tt := range []struct {
		name               string
		method, path, body string
		headers            []string
		before             func(*rig)
		status             int
		line, reason       string
		label              string // of the metric
	}{
		{"address", "POST", "/webhooks/ci", "", elsewhere, nil, 403, hook, "address not allowed", "address"},
		{"signature", "POST", "/webhooks/signed", "canary", []string{"X-Gitea-Signature", "canary"}, nil, 401, hook, "missing or wrong signature", "signature"},
		{"size, announced", "POST", "/webhooks/ci", strings.Repeat("canary", 200), nil, nil, 413, hook, "payload too large", "size"},
		{"size, found", "POST", "/webhooks/ci", strings.Repeat("canary", 200), nil, nil, 413, hook, "payload too large", "size"},
		{"values", "POST", "/webhooks/ci", "", many, nil, 431, hook, "too many header fields", "size"},
		{"dots", "POST", "/webhooks/ci/%2e%2e", "", nil, nil, 400, hook, "invalid path", "path"},
		{"channel", "POST", "/webhooks/c%40i", "", nil, nil, 400, hook, "invalid channel", "channel"},
		{"budget", "POST", "/webhooks/ci", "canary", nil, nil, 503, hook, "too many requests wait", "budget"},
		{"bus", "POST", "/webhooks/broken", "canary", nil, nil, 503, hook, "bus unavailable", "bus"},
		{"shutdown", "POST", "/webhooks/ci", "canary", nil, ended, 503, hook, "shutting down", "shutdown"},
		{"nobody", "POST", "/webhooks/waits", "canary", nil, nil, 503, hook, "nobody connected", "nobody"},
		{"misspelled", "POST", "/webhook/ci", "canary", nil, nil, 404, misled, "not found", "path"},
		{"misspelled, at a browser", "GET", "/webhook/ci", "", nil, nil, 404, browsed, "not found", "path"},
		{"no path", "POST", "/", "canary", nil, nil, 405, misled, "method not allowed", "method"},

		{"token", "GET", "/subscribe/ci/", "", nil, nil, 401, stream, "missing or wrong token", "token"},
		{"wrong token", "GET", "/subscribe/ci/", "", []string{"Authorization", "Bearer canary"}, nil, 401, stream, "missing or wrong token", "token"},
		{"address of a subscriber", "GET", "/subscribe/ci/", "", elsewhere, nil, 403, stream, "address not allowed", "address"},
		{"limit", "GET", "/subscribe/ci/", "", token, nil, 503, stream, "too many subscribers", "limit"},
		{"channel of a subscriber", "GET", "/subscribe/c%40i", "", token, nil, 400, stream, "invalid channel", "channel"},
		{"method of a subscriber", "PUT", "/subscribe/ci/", "", token, nil, 405, stream, "method not allowed", "method"},
		{"body of a subscriber", "GET", "/subscribe/other/", "canary", token, nil, 400, stream, "no body expected", "body"},
		{"body of a subscriber, found", "GET", "/subscribe/other/", "canary", token, nil, 400, stream, "no body expected", "body"},
		{"shutdown of a subscriber", "GET", "/subscribe/other/", "", token, ended, 503, stream, "shutting down", "shutdown"},
		{"never live", "GET", "/subscribe/other/", "", token, kept, 503, stream, "bus unavailable", "bus"},
		{"token of a report", "POST", reports, "canary", []string{"X-Auth-Token", "canary"}, nil, 401, report, "missing or wrong token", "token"},
		{"address of a report", "POST", reports, "canary", elsewhere, nil, 403, report, "address not allowed", "address"},
		{"method of a report", "GET", reports, "", token, nil, 405, stream, "method not allowed", "method"},
		{"malformed report", "POST", reports, "canary", token, nil, 400, report, "invalid report", "body"},
		{"budget of reports", "POST", reports, said, token, nil, 503, report, "too many requests wait", "budget"},
		{"bus of a report", "POST", reports, strings.Replace(said, testReplica, "ELSEWHEREAAAA", 1), token, nil, 503, report, "bus unavailable", "bus"},

		{"accepted", "POST", "/webhooks/ci", "canary", nil, nil, 200, "INFO webhook accepted", "", ""},
		{"answered", "POST", "/webhooks/answers", "canary", nil, nil, 200, "INFO webhook answered", "", ""},
		{"unknown", "POST", "/webhooks/unknown", "canary", nil, wait, 200, "WARN webhook lost", "unknown_channel", "unknown_channel"},
		{"report", "POST", reports, said, token, nil, 204, "", "", ""},
		{"probe", "GET", "/", "", nil, nil, 200, "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			around := func(h *Hub) Bus {
				if tt.label != "bus" {
					return h
				}
				broken := errors.New("broken")
				return stubBus{h, func(context.Context, *Event) (int, error) { return 0, broken }, broken}
			}
			relayOn(t, around, []string{"AUTH_TOKEN=secret", "SERVER_MAX_SUBSCRIBERS=4", "SUBSCRIBE_ALLOWED_IPS=192.0.2.0/24", "WEBHOOKS_ALLOWED_IPS=192.0.2.0/24",
				"TRUSTED_PROXIES=192.0.2.1", "SERVER_MAX_PAYLOAD_SIZE_LIMIT=1kb", "RESPONSE_MODE=accept, waits=status, answers=status",
				"WEBHOOK_SECRETS_FILE=" + tokensFile(t, "signed gitea hunter2\n")}, func(t *testing.T, r *relay) {
				if tt.name == "values" && !r.rt.Protocols.HTTP1() {
					return // HTTP/2 counts 32 bytes more for each: they are too large before they are too many
				}
				for _, channel := range []string{"ci", "ci", "answers"} { // half of the subscribers are of one channel
					r.listen(channel, token...)
				}
				if tt.before != nil {
					tt.before(r.rig)
				}
				if tt.label == "budget" {
					for _, b := range []*Budget{r.budget, r.reports} {
						all, _ := b.claim("other", 0)
						all.add(b.Limit)
						defer all.end()
					}
				}
				level, what, _ := strings.Cut(tt.line, " ")
				want := r.outcomes()
				expect(t, "labels", len(want), 2+len(lostReasons)+len(webhookReasons)+len(subscriberReasons))
				switch kind, outcome, _ := strings.Cut(what, " "); kind {
				case "webhook", "request":
					want[fmt.Sprintf(`webhooks_total{outcome=%q,reason=%q}`, outcome, tt.label)]++
				case "subscriber", "report":
					want[fmt.Sprintf(`subscribers_refused_total{reason=%q}`, tt.label)]++
				}
				synctest.Wait()
				begin := len(r.log.String())
				var body io.Reader = strings.NewReader(tt.body)
				if strings.HasSuffix(tt.name, ", found") {
					body = io.MultiReader(body) // whose length nobody knows
				}
				req := requestOf(t.Context(), tt.method, "http://relay.test"+tt.path+"?q=canary", body, append(tt.headers, "User-Agent", "canary")...)
				resp := must(r.rt.RoundTrip(req))
				resp.Body.Close()
				synctest.Wait()
				expect(t, "status", resp.StatusCode, tt.status)
				expect(t, "counted", r.outcomes(), want)
				expect(t, "the log tells too much", strings.Contains(r.log.String(), "canary"), false)
				said := strings.TrimSuffix(r.log.String()[begin:], "\n")
				if tt.line == "" {
					expect(t, "logged", said, "")
					return
				}
				var line map[string]any
				if err := json.Unmarshal([]byte(said), &line); err != nil {
					t.Fatalf("logged %s, want one line", said)
				}
				addr := map[bool]string{true: "198.51.100.1", false: "192.0.2.1"}[strings.HasPrefix(tt.name, "address")]
				if line["level"] != level || line["msg"] != what || tt.reason != "" && line["reason"] != tt.reason || line["status"] != float64(tt.status) ||
					strings.HasSuffix(what, "refused") && line["addr"] != addr ||
					strings.HasPrefix(what, "webhook") && (line["path"] != tt.path || line["method"] != tt.method) {
					t.Errorf("logged %v", line)
				}
			})
		})
	}
}

// TestNoClient: what was accepted, and no client comes for in time, is lost, counted
// and told.
func TestNoClient(t *testing.T) {
	relayTest(t, nil, func(t *testing.T, r *relay) {
		time.Sleep(2 * time.Minute) // from now on it knows which channels there are
		r.listen("ci", features...).leave()
		r.post("ci", "{}").is(t, 200, "")
		time.Sleep(r.opts.HoldTime - 1)
		expect(t, "lost before its time", total(r.Lost), 0)
		time.Sleep(2 * lookInterval)
		expect(t, "lost", []int64{r.Lost["no_client"].Load(), total(r.Lost), r.Accepted.Load()}, []int64{1, 1, 0})
		if lines := r.log.lines("webhook lost"); len(lines) != 1 || lines[0]["reason"] != "no_client" || lines[0]["level"] != "WARN" {
			t.Errorf("logged %v", lines)
		}
	})
}

// TestResponseTimeout: a request that nobody comes for ends in its channel's time,
// also when that is longer than any deadline of net/http.
func TestResponseTimeout(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=status", "RESPONSE_TIMEOUT=2500, ci=14m"}, func(t *testing.T, r *relay) {
		for channel, timeout := range map[string]time.Duration{"ci": 14 * time.Minute, "other": 2500 * time.Millisecond} {
			begin := time.Now()
			a := r.post(channel, "{}")
			a.refused(t, 503, "nobody connected")
			expect(t, channel, a.at.Sub(begin), timeout)
		}
	})
}

// TestAnswerIsNotRead: a provider that does not take its answer is cut soon
// after its time, however much of that was left when the answer came.
func TestAnswerIsNotRead(t *testing.T) {
	for timeout, after := range map[time.Duration]time.Duration{20 * time.Second: time.Second, 5 * time.Minute: 280 * time.Second} {
		relayTest(t, []string{"RESPONSE_MODE=response", "RESPONSE_TIMEOUT=" + timeout.String()}, func(t *testing.T, r *relay) {
			r.rt.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10} // less than the answer has
			stream, begin := r.listen("ci", features...), time.Now()
			answers := make(chan *http.Response)
			go func() {
				answers <- must(r.rt.RoundTrip(requestOf(context.Background(), "POST", hooksURL, strings.NewReader("{}"))))
			}()
			time.Sleep(after)
			r.report(stream, stream.next(t, 1).id, Answer{Status: 200, Body: make([]byte, answerLimit)})
			resp := <-answers
			defer resp.Body.Close()
			<-done(&r.requests)
			expect(t, "ended after", time.Since(begin), timeout+replyTimeout)
			if n, err := io.Copy(io.Discard, resp.Body); err == nil {
				t.Errorf("%d bytes of the answer were there in the end", n)
			}
		})
	}
}

// TestStreamEndsBeforeAnswer checks that the event goes to the next client,
// with the same id, as it was: its time tells how old it is.
func TestStreamEndsBeforeAnswer(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=response"}, func(t *testing.T, r *relay) {
		first := r.listen("ci", features...)
		told := r.posted("ci", "{}")
		time.Sleep(2 * time.Second)
		first.close()
		time.Sleep(2 * time.Second)
		begin, second := time.Now(), r.listen("ci", features...)
		one, two := first.next(t, 1), second.next(t, 1)
		at(t, "the second has it", two.at.Sub(begin), 0)
		if w := two.webhook(t); one.id != two.id || one.data != two.data || w.Mode != modeResponse || w.Timeout != 9*time.Second {
			t.Errorf("first %q, then %q", one.data, two.data)
		}
		r.report(second, two.id, Answer{Status: 202})
		(<-told).is(t, 202, "")
		expect(t, "deliveries to the second", len(second.got("message")), 1)
	})
}

// TestHeldAreMoreThanTheQueue: a stream that becomes ready, and is slow, gets held
// webhooks beyond its queue once each, whether its client can answer or not.
func TestHeldAreMoreThanTheQueue(t *testing.T) {
	for _, headers := range [][]string{nil, {"X-Relay-Features", "http, respond", "X-Relay-Client", "ours"}} {
		relayTest(t, []string{"RESPONSE_MODE=status", "RESPONSE_TIMEOUT=60s", "SERVER_SUBSCRIBER_BUFFER=64kb"}, func(t *testing.T, r *relay) {
			const n = 40
			told := map[<-chan outcome]bool{}
			for range n {
				told[r.posted("ci", strings.Repeat("x", 16<<10))] = true
			}
			events, arrived := newParser(slowly{unread(t, r.rt, headers...).Body}), map[string]bool{}
			for begin := time.Now(); len(arrived) < n; {
				m, err := events.next()
				again := arrived[m.id] && m.name != "heartbeat"
				if err != nil || time.Since(begin) > time.Minute || again {
					t.Fatalf("after %d webhooks: %q, %v", len(arrived), m.id, err)
				}
				if m.name == "message" || m.name == "webhook" {
					arrived[m.id] = true
				}
				if m.name == "webhook" {
					r.ask("POST", "/subscribe/ci/responses", reportOf(m.id, Answer{Status: 204}), "X-Relay-Client", "ours").is(t, 204, "")
				}
			}
			for c := range told {
				(<-c).is(t, map[bool]int{true: 200, false: 204}[headers == nil], "")
			}
			expect(t, "evicted", r.hub.Evicted.Load(), 0)
		})
	}
}

// slowly is a reader that takes a while for little.
type slowly struct{ io.Reader }

func (s slowly) Read(p []byte) (int, error) {
	time.Sleep(50 * time.Millisecond)
	return s.Reader.Read(p[:min(len(p), 4<<10)])
}

// TestHeldWhileBusIsBusy: a bus that did not take a held event, and says nothing
// when it would, is asked again.
func TestHeldWhileBusIsBusy(t *testing.T) {
	var busy atomic.Bool
	around := func(h *Hub) Bus {
		return stubBus{h, func(ctx context.Context, e *Event) (int, error) {
			if busy.Load() {
				return 0, errors.New("busy")
			}
			return h.Publish(ctx, e)
		}, nil}
	}
	relayOn(t, around, []string{"RESPONSE_MODE=status"}, func(t *testing.T, r *relay) {
		told := r.posted("ci", "x")
		busy.Store(true)
		l := r.listen("ci", features...)
		time.Sleep(3 * time.Second)
		expect(t, "events while the bus is busy", len(l.got("message")), 0)
		busy.Store(false)
		freed := time.Now()
		e := l.next(t, 1)
		between(t, "delivered after", 0, e.at.Sub(freed), retryInterval+lookInterval)
		r.report(l, e.id, Answer{Status: 204})
		(<-told).is(t, 204, "")
	})
}

// TestReportedWhileBusBreaks: a webhook that a client has reported on has arrived,
// whatever the bus says of it later; to send it again would be to deliver it twice.
func TestReportedWhileBusBreaks(t *testing.T) {
	for _, tt := range []struct {
		mode         string
		report, told int // 0: none
		outcome      string
	}{
		{"accept", 202, 200, "accepted"},
		{"status", 201, 201, "answered"},
		{"status", 500, 500, "answered"},
		{"accept", 0, 200, "accepted"}, // a client has it, and says so later
	} {
		var breaks chan struct{}
		around := func(h *Hub) Bus {
			breaks = make(chan struct{})
			return stubBus{h, func(ctx context.Context, e *Event) (int, error) {
				h.Publish(ctx, e)
				<-breaks
				return 0, errors.New("broken")
			}, nil}
		}
		relayOn(t, around, []string{"RESPONSE_MODE=" + tt.mode}, func(t *testing.T, r *relay) {
			client := r.listen("ci", features...)
			told := r.posted("ci", "{}")
			id := client.next(t, 1).id
			if tt.report != 0 {
				r.report(client, id, Answer{Status: tt.report})
			}
			close(breaks)
			(<-told).is(t, tt.told, "")
			r.report(client, id, Answer{Status: 202})
			synctest.Wait()
			expect(t, "counted", r.outcomes()[fmt.Sprintf("webhooks_total{outcome=%q,reason=\"\"}", tt.outcome)], 1)
			expect(t, "refused and lost", total(r.Refused)+total(r.Lost), 0)
			expect(t, "held", r.Held().Webhooks, 0)
		})
	}
}

// TestSenderHangsUp checks that a hold ends with its sender and leaves nothing,
// not even its body.
func TestSenderHangsUp(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=response", "RESPONSE_TIMEOUT=10m"}, func(t *testing.T, r *relay) {
		stream := r.listen("ci", features...)
		ctx, hangUp := context.WithCancel(t.Context())
		for range 20 {
			go post(ctx, r.rt, "POST", hooksURL, strings.Repeat("x", 100<<10))
		}
		synctest.Wait()
		var bodies []weak.Pointer[byte]
		r.mu.Lock()
		for _, h := range r.holds {
			bodies = append(bodies, weak.Make(&h.event.wire[0]))
		}
		r.mu.Unlock()
		expect(t, "held", len(bodies), 20)
		hangUp()
		synctest.Wait()
		expect(t, "held at the end", r.Held(), HeldState{Limit: r.budget.Limit})
		expect(t, "refused, as their senders are gone", r.Refused["gone"].Load(), 20)
		r.report(stream, stream.got("message")[0].id, Answer{Status: 200}) // to nobody
		runtime.GC()
		runtime.GC() // net/http pools what it wrote last, and a pool outlives one
		bodies = slices.DeleteFunc(bodies, func(body weak.Pointer[byte]) bool { return body.Value() == nil })
		if len(bodies) > 2 { // which net/http may have in its hands once more
			t.Errorf("%d events stay in memory", len(bodies))
		}
	})
}

// TestReports: what is refused of a report, and what is not for this sender, does
// not reach him. TestReportForm has the forms.
func TestReports(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=response", "AUTH_TOKENS_FILE=" + tokensFile(t, "ci secret\nother else\n")}, func(t *testing.T, r *relay) {
		stream := r.listen("ci", append([]string{"X-Auth-Token", "secret"}, features...)...)
		told := r.posted("ci", "{}")
		id := stream.next(t, 1).id
		ok := reportOf(id, Answer{Status: 200, Headers: []Header{{"X-A", []string{"1"}}}, Body: []byte("answered")})
		of := func(other string) string { return strings.Replace(ok, id, other, 1) }
		other, elsewhere := of(testID), of("ELSEWHEREAAAA"+id[13:])
		const malformed, denied = "invalid report", "missing or wrong token"
		for _, tt := range []struct {
			name, channel, token, body string
			status                     int
			message                    string
		}{
			{"another id", "ci", "secret", other, 204, ""},
			{"id of another replica", "ci", "secret", elsewhere, 204, ""},
			{"wrong channel", "other", "else", ok, 204, ""},
			{"wrong token", "ci", "else", ok, 401, denied},
			{"no token", "ci", "", ok, 401, denied},
			{"empty", "ci", "secret", "", 400, malformed},
			{"cut", "ci", "secret", ok[:len(ok)-1], 400, malformed},
			{"too large together", "ci", "secret", strings.Repeat(reportOf(testID, Answer{Status: 200, Body: make([]byte, answerLimit)}), 4) + ok, 400, malformed},
			{"right, behind others", "ci", "secret", other + elsewhere + ok + other, 204, ""},
			{"right, but late", "ci", "secret", ok, 204, ""},
		} {
			got := r.ask("POST", "/subscribe/"+tt.channel+"/responses", tt.body, "Authorization", "Bearer "+tt.token, "X-Relay-Client", stream.client)
			if tt.message != "" {
				got.refused(t, tt.status, tt.message)
			} else {
				got.is(t, tt.status, "")
			}
			synctest.Wait()
			expect(t, tt.name+": held", r.Held().Webhooks, map[bool]int{false: 1}[strings.HasPrefix(tt.name, "right")])
		}
		a := <-told
		a.is(t, 200, "answered")
		expect(t, "X-A", a.header.Get("X-A"), "1")
	})
}

// TestHoldVerdict plays what replicas say about a held request in every order
// in which it may come: they are not synchronised with each other.
func TestHoldVerdict(t *testing.T) {
	given := map[string]Given{"a1": {"1", "a"}, "a2": {"2", "a"}, "b": {"3", "b"}, "c": {"4", "c"}, "reader": {"7", ""}}
	const open, waits = "open", "waits"
	for _, tt := range []struct {
		name, steps string
		accept      string // what becomes of it in accept: open, waits, or done; empty: it has no such step
		status      string // and in status: open, waits, or what the sender is told
	}{
		{"nothing", "nothing", open, open},
		{"nobody", "sent 0", waits, waits},
		{"full", "sent 1, given", waits, waits},
		{"reported", "sent 1, given b, report b 500", "done", "500"},
		{"receipt before the publish returns, then it does", "given b, report b 500, sent 1", "done", "500"},
		{"success before anything else", "report b 204", open, "204"},
		{"report before the receipt, which comes", "sent 1, report b 500, given b", "done", "500"},
		{"report before the receipt, which does not come", "sent 1, report b 500, after receiptTimeout", "done", "500"},
		{"no receipt comes", "sent 1, after receiptTimeout", waits, waits},
		{"report before the receipt of two", "sent 1, report b 500, given b c", open, open},
		{"receipt of one replica of two", "sent 2, given b, report b 500", open, open},
		{"receipt of an earlier publication", "sent 1, earlier b, report b 500", open, open},
		{"receipts of both", "sent 2, given b, report b 500, given c, report c 404", "done", "404"},
		{"one report for all streams of a client", "sent 1, given a1 a2, report a 500", "done", "500"},
		{"one report for a stream that is given it later", "sent 2, given a1, report a 500, given a2", "done", "500"},
		{"one stream of two left", "sent 1, given a1 a2, left 1", open, open},
		{"left", "sent 1, given b, left 3", waits, waits},
		{"left before the receipt", "sent 1, left 3, given b", waits, waits},
		{"left, and another has reported: it may come back", "sent 1, given b c, left 3, report c 500", open, open},
		{"left before the receipt, and another has reported", "sent 1, left 3, given b c, report c 500", open, open},
		{"left, and did not come back", "sent 1, given b c, left 3, report c 500, after returnTime", "done", "500"},
		{"left after its report", "sent 1, given b c, report b 500, left 3, report c 503", "done", "500"},
		{"reported after it left", "sent 1, given b c, left 3, report b 404, report c 500", "done", "404"},
		{"left, would still report, and did not", "sent 1, given b, report b taken, left 3, after returnTime", waits, waits},
		{"another one leaves", "sent 1, given b, left 9", open, open},
		{"its replica is gone", "sent 1, given b, gone other", waits, waits},
		{"the bus was away for its replica", "sent 1, given b, again other", waits, waits},
		{"the bus was away", "sent 1, again REPLICAAAAAAA", waits, waits},
		{"a reader", "sent 1, given reader", "done", "200"},
		{"a reader, of one replica of two", "sent 2, given reader", open, open},
		{"a reader, and another can report", "sent 1, given reader b", open, open},
		{"a reader, and another has reported", "sent 1, given reader b, report b 500", "done", "500"},
		{"a reader does not stand in for who died", "sent 1, given reader b, left 3, after returnTime", waits, waits},
		{"the first success of several", "sent 1, given a1 b c, report a 500, report b 204", open, "204"},
		{"the best failure", "sent 1, given a1 b c, report a 500, report b 404, report c timeout", "done", "404"},
		{"its word beats silence", "sent 1, given a1 b c, report a unreachable, report b timeout, report c 503", "done", "503"},
		{"silence beats absence", "sent 1, given a1 b c, report a unreachable, report b timeout, report c unreachable", "done", "timeout"},
		{"one stays silent", "sent 1, given a1 b c, report a 500, report b 404, expired", "", "404"},
		{"all stay silent", "sent 1, given a1, left 1, after returnTime, expired", "", "no answer in time"},
		{"nobody comes", "sent 0, expired", "", "nobody connected"},
	} {
		for mode, want := range map[string]string{modeAccept: tt.accept, modeStatus: tt.status} {
			t.Run(tt.name+", "+mode, func(t *testing.T) {
				hub := &Hub{Budget: &Budget{Limit: 1 << 20}}
				silent := stubBus{hub, func(context.Context, *Event) (int, error) { return 0, nil }, nil}
				s := must(NewServer(ServerOptions{Replica: testReplica, HoldTime: time.Minute}, hub, silent, slog.New(slog.DiscardHandler)))
				hub.OnSignal = s.signal
				s.over = true // nothing is published again
				h := &hold{event: eventOf("ci", &Webhook{ID: testID, Method: "POST", Path: "/webhooks/ci", Mode: mode, Timeout: time.Minute})}
				if mode == modeStatus {
					h.done = make(chan struct{})
					h.claim, _ = s.budget.claim("ci", requestCost)
				}
				expect(t, "refused", s.begin(h), nil)
				h.round, h.publish = 1, true
				for step := range strings.SplitSeq(tt.steps, ", ") {
					switch of := strings.Fields(step); of[0] {
					default:
						t.Fatalf("there is no step %q", step)
					case "nothing":
					case "sent":
						s.mu.Lock()
						s.published(h, must(strconv.Atoi(of[1])))
						s.mu.Unlock()
					case "given", "earlier": // in this round, or one before
						sig := Signal{Kind: signalReceipt, From: "other", Event: testID, Round: map[string]int{"given": 1}[of[0]]}
						for _, name := range of[1:] {
							sig.Given = append(sig.Given, given[name])
						}
						s.signal(sig)
					case "report":
						answer := Answer{Err: of[2]}
						if status, err := strconv.Atoi(of[2]); err == nil {
							answer = Answer{Status: status}
						}
						s.reported(testID, "ci", of[1], &answer)
					case "left":
						s.signal(Signal{Kind: signalLeft, Channel: "ci", Subscriber: of[1]})
					case signalGone, signalAgain:
						s.signal(Signal{Kind: of[0], From: of[1]})
					case "after":
						s.look(time.Now().Add(map[string]time.Duration{"receiptTimeout": receiptTimeout, "returnTime": returnTime}[of[1]]))
					case "expired":
						s.expire(h, errNobody)
					}
				}
				got := open
				switch {
				case h.place > 0:
					got = waits
				case s.waits(testID):
				case mode == modeAccept:
					got = "done"
				case h.best != nil:
					got = cmp.Or(h.best.Err, strconv.Itoa(h.best.Status))
				case h.refused == nil:
					got = "200"
				default:
					got = h.refused.message
				}
				if got != cmp.Or(want, got) {
					t.Errorf("it is %s, want %s: %d receipts to come, %d open of %d", got, want, h.receipts, h.open, len(h.parties))
				}
				if !s.waits(testID) {
					expect(t, "subscribers, clients and holds that are remembered", []int{len(s.having), len(h.line.missed), h.line.holds}, []int{0, 0, 0})
				}
			})
		}
	}
}

// TestNeverLive checks that a stream which was given a held event and never
// began counts as one that ended: its client may come back for a while.
func TestNeverLive(t *testing.T) {
	relayTest(t, []string{"RESPONSE_MODE=status", "RESPONSE_TIMEOUT=1m"}, func(t *testing.T, r *relay) {
		r.hub.Watch = func(string) {} // nothing becomes live by itself
		never := make(chan outcome, 1)
		go func() {
			never <- r.ask("GET", "/subscribe/ci", "", append([]string{"X-Relay-Client", "never"}, features...)...)
		}()
		synctest.Wait()
		begin, told := time.Now(), r.posted("ci", "{}")
		(<-never).refused(t, 503, "bus unavailable")
		r.hub.Watch = nil
		second := r.listen("ci", features...)
		r.report(second, second.next(t, 1).id, Answer{Status: 500})
		a := <-told
		a.is(t, 500, "")
		between(t, "told after", liveTimeout+returnTime, a.at.Sub(begin), liveTimeout+returnTime+lookInterval)
	})
}

// Who may subscribe, and from where.

// serverWith is a server that knows these tokens, as if from a file.
func serverWith(tokens byChannel[[][32]byte]) *Server {
	s := &Server{opts: ServerOptions{TokensFile: "tokens"}}
	s.tokens.inForce.Store(&tokens)
	return s
}

// TestParseTokens is the form of a tokens file. What is malformed is refused as
// a whole, and never quoted.
func TestParseTokens(t *testing.T) {
	for _, tt := range []struct{ text, opens, shut, err string }{ // opens and shut are "channel token", separated by commas
		{"ci secret", "ci secret", "ci other,cd secret,ci,* secret", ""},
		{"# comment\n\n ci\tone \r\nci two\ncd three\n", "ci one,ci two,cd three", "cd one,ci three,ci #", ""},
		{"* all\nci one", "ci all,cd all,ci one", "cd one", ""},
		{"\uFEFFci secret\n", "ci secret", "cd secret", ""},
		{"  # ci x\nci y", "ci y", "ci x", ""},
		{"ci a#b", "ci a#b", "ci a", ""},
		{"", "", "", "says nothing"},
		{"# ci secret\n\n", "", "", "says nothing"},
		{"ci secret\nci\n", "", "", "line 2: want a channel and a token"},
		{"ci secret more", "", "", "line 1: want a channel and a token"},
		{"c/i secret", "", "", "line 1: invalid channel"},
	} {
		tokens, err := parseTokens(tt.text)
		expect(t, tt.text, fmt.Sprint(err), cmp.Or(tt.err, "<nil>"))
		for list, allowed := range map[string]bool{tt.opens: true, tt.shut: false} {
			for entry := range strings.SplitSeq(list, ",") {
				if channel, token, _ := strings.Cut(entry, " "); err == nil {
					expect(t, tt.text+": "+entry, serverWith(tokens).opens(channel, sha256.Sum256([]byte(token))), allowed)
				}
			}
		}
	}
	none := sha256.Sum256(nil)
	expect(t, "a server without any token is open", new(Server).opens("ci", none), true)
	expect(t, "one whose file has none is open", serverWith(byChannel[[][32]byte]{}).opens("ci", none), false)
}

// FuzzParseTokens checks that a file which is taken opens exactly what its lines
// say, and that an error gives nothing of the file away.
func FuzzParseTokens(f *testing.F) {
	for _, text := range []string{"ci secret\n* all", "# x\n\nci a\nci b", "ci", "c/i x", "\uFEFFa b\r\nc d e"} {
		f.Add(text)
	}
	told := regexp.MustCompile(`^(line \d+: (want a channel and a token|invalid channel)|says nothing)$`)
	f.Fuzz(func(t *testing.T, text string) {
		tokens, err := parseTokens(text)
		if err != nil && !told.MatchString(err.Error()) {
			t.Errorf("error %q", err)
		}
		if err != nil {
			return
		}
		want := byChannel[[][32]byte]{Named: map[string][][32]byte{}}
		for line := range strings.Lines(strings.TrimPrefix(text, "\uFEFF")) {
			if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "*" {
				want.Default = append(want.Default, sha256.Sum256([]byte(fields[1])))
			} else if len(fields) > 0 && fields[0][0] != '#' {
				want.Named[fields[0]] = append(want.Named[fields[0]], sha256.Sum256([]byte(fields[1])))
			}
		}
		expect(t, "tokens", tokens, want)
		for channel := range tokens.Named {
			expect(t, channel+" is a name", validName(channel), true)
		}
	})
}

// TestTokensReload renews a file behind a symbolic link, as Kubernetes does: rotation
// disturbs nobody, and a revoked token's streams end within ten seconds.
func TestTokensReload(t *testing.T) {
	tokens, secrets := tokensFile(t, "ci old\nother else\n"), tokensFile(t, "signed gitea hunter2\n")
	link := tokens + "-link"
	expect(t, "link", os.Symlink(tokens, link), nil)
	rigTest(t, []string{"AUTH_TOKENS_FILE=" + link, "AUTH_TOKEN=master", "WEBHOOK_SECRETS_FILE=" + secrets}, func(t *testing.T, p *pipes, rg *rig) {
		r := &relay{rig: rg, t: t, rt: p.transport(t, false), base: "http://relay.test"}
		old := r.listen("ci", "X-Auth-Token", "old")
		r.listen("ci", "Authorization", "bearer master")
		r.listen("other", "Authorization", "Bearer else")
		step := func(text string, streams int, good string) {
			t.Helper()
			replace(t, tokens, []byte(text))
			time.Sleep(10 * time.Second)
			expect(t, "streams", r.streamCount(), streams)
			for _, token := range []string{"old", "new", "master", "else", "x"} {
				expect(t, "with "+token, r.opens("X-Auth-Token", token), map[bool]int{true: 204, false: 401}[strings.Contains(good, token)])
			}
		}
		step("ci old\nci new\nother else\n", 3, "old new master")
		step("ci new\nother else\n", 2, "new master")
		old.endedAt(t)
		step("ci x\nci\n", 2, "new master")
		step("other else\n", 2, "master")
		expect(t, "a token is in the log", strings.Contains(r.log.String(), "master"), false)

		signed := []string{"X-Gitea-Signature", hexMAC("hunter3", "{}")}
		r.post("signed", "{}", signed...).refused(t, 401, "missing or wrong signature")
		replace(t, secrets, []byte("signed gitea hunter3\n"))
		time.Sleep(10 * time.Second)
		r.post("signed", "{}", signed...).is(t, 200, "")
	})
}

// tokensIn is the watched file of that name.
func tokensIn(name string) *watched[byChannel[[][32]byte]] {
	return &watched[byChannel[[][32]byte]]{variable: "AUTH_TOKENS_FILE", name: name, parse: parseTokens}
}

// TestWatchedFile: writers may be slow, or err: the last good file stays in force. One
// whose last line is not complete may be cut within a token, which would open the
// channel to a part of it: two looks have to find it the same.
func TestWatchedFile(t *testing.T) {
	var said logBuffer
	log, w := newLogger(&Config{}, &said), tokensIn(tokensFile(t, "ci old\n"))
	expect(t, "open", w.open(), nil)
	errs, readings := 0, 0
	for _, tt := range []struct {
		text    string // "": no file; "pipe": a pipe
		tokens  string // that open the channel then
		err, in int    // more errors, and more readings
	}{
		{"ci old\nci new\n", "old new", 0, 1},
		{"ci new\n", "new", 0, 1},
		{"ci new\nci\n", "new", 1, 0},
		{"ci new\nci\n", "new", 0, 0}, // told once
		{"c/i newer\n", "new", 1, 0},
		{"# nothing\n", "new", 1, 0},
		{"", "new", 1, 0},
		{"pipe", "new", 1, 0}, // which nobody writes
		{strings.Repeat("ci x\n", watchedLimit/5+1), "new", 1, 0},
		{"ci new", "new", 0, 0},
		{"ci newest-of", "new", 0, 0},
		{"ci newest-of-all", "new", 0, 0},
		{"ci newest-of-all", "newest-of-all", 0, 1},
		{"ci ol", "newest-of-all", 0, 0}, // two looks have to follow each other
		{"ci old\nci x", "newest-of-all", 0, 0},
		{"ci ol", "newest-of-all", 0, 0},
		{"c/i ol", "newest-of-all", 1, 0},
		{"ci ol", "newest-of-all", 0, 0},
		{"other new\n", "", 0, 1},
	} {
		os.Remove(w.name)
		switch tt.text {
		case "":
		case "pipe":
			syscall.Mkfifo(w.name, 0o600)
		default:
			replace(t, w.name, []byte(tt.text))
		}
		expect(t, "reload", w.reload(log), tt.in > 0)
		var tokens []string
		for _, token := range []string{"old", "ol", "new", "newest-of", "newest-of-all", "x"} {
			if serverWith(w.value()).opens("ci", sha256.Sum256([]byte(token))) {
				tokens = append(tokens, token)
			}
		}
		errs, readings = errs+tt.err, readings+tt.in
		expect(t, fmt.Sprintf("%.40q", tt.text), strings.Join(tokens, " "), tt.tokens)
		expect(t, "errors and readings", []int{len(said.lines("file kept as it was")), len(said.lines("file read again"))}, []int{errs, readings})
	}
	expect(t, "the file is in the log", strings.Contains(said.String(), "newe"), false)
}

// TestFileAtStart: the start waits until a file is complete, but not for ever.
func TestFileAtStart(t *testing.T) {
	for name, tt := range map[string]struct {
		begin string
		later []string // one a settleInterval, between two looks
		took  time.Duration
		err   string
	}{
		"all":       {"ci secret\nci other\n", nil, 0, ""},
		"no end":    {"ci secret\nci other", nil, settleInterval, ""},
		"by pieces": {"ci se", []string{"ci secr", "ci secret\nci oth", "ci secret\nci other\n"}, 3 * settleInterval, ""},
		"endless":   {"ci se", strings.Split("ci a,ci b,ci c,ci d,ci e,ci f,ci g,ci h,ci i,ci j", ","), settleTime, "keeps changing"},
	} {
		w := tokensIn(tokensFile(t, tt.begin))
		inBubble(t, func(t *testing.T) {
			for i, text := range tt.later {
				time.AfterFunc(time.Duration(2*i+1)*settleInterval/2, func() { os.WriteFile(w.name, []byte(text), 0o600) })
			}
			begin := time.Now()
			err := w.open()
			expect(t, name+": took", time.Since(begin), tt.took)
			if tt.err == "" && (err != nil || len(w.value().Named["ci"]) != 2) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%s: %v, %v", name, err, w.value())
			}
		})
	}
}

// TestFileThatNeverEnds: a pipe in the place of a file keeps no start waiting.
func TestFileThatNeverEnds(t *testing.T) {
	dir := t.TempDir()
	pipe, certFile, keyFile := filepath.Join(dir, "pipe"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	syscall.Mkfifo(pipe, 0o600)
	writeCertificate(t, certFile, keyFile, 1)
	for _, name := range []string{"AUTH_TOKENS_FILE", "WEBHOOK_SECRETS_FILE", "SERVER_TLS_CLIENT_CA_FILE", "SERVER_TLS_CERT_FILE", "SERVER_TLS_KEY_FILE"} {
		env := []string{"RELAY_MODE=server", "SERVER_TLS_CERT_FILE=" + certFile, "SERVER_TLS_KEY_FILE=" + keyFile, name + "=" + pipe}
		if _, _, err := loadConfig(env); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTokenRevokedMeanwhile: a token that is revoked after it was looked at,
// and before its stream could be evicted with the others, opens nothing.
func TestTokenRevokedMeanwhile(t *testing.T) {
	relayTest(t, []string{"AUTH_TOKENS_FILE=" + tokensFile(t, "* old\n")}, func(t *testing.T, r *relay) {
		tokens := must(parseTokens("* new\n"))
		r.hub.Watch = func(channel string) { // while it is being registered
			r.tokens.inForce.Store(&tokens)
			go r.hub.Confirm(channel)
		}
		r.ask("GET", "/subscribe/ci", "", "X-Auth-Token", "old").refused(t, 401, "missing or wrong token")
		synctest.Wait()
		expect(t, "streams", r.streamCount(), 0)
		r.listen("ci", "X-Auth-Token", "new")
	})
}

// TestForwardedFor walks the list from the right: what a sender writes itself
// stands left of what the first trusted proxy saw.
func TestForwardedFor(t *testing.T) {
	proxies := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}
	for want, tests := range map[string][][]string{ // the zero address: refused
		"10.0.0.1": {nil},
		"10.0.0.3": {{"10.0.0.3, 10.0.0.2"}},
		"198.51.100.1": {{"198.51.100.1"}, {"198.51.100.1, 10.9.9.9"}, {"10.1.1.1, 127.0.0.1, 198.51.100.1"}, {"garbage, , 198.51.100.1"}, {"198.51.100.1, 2001:db8::7"},
			{"1.1.1.1", "198.51.100.1,10.2.2.2"}, {"198.51.100.1:4711"}, {"::ffff:198.51.100.1, ::ffff:10.0.0.7"}},
		"2001:db9::5": {{"2001:db9::5"}, {"[2001:db9::5]"}, {"[2001:db9::5]:4711"}},
		"fe80::1":     {{"fe80::1%eth0"}},
		"invalid IP":  {{"garbage"}, {""}, {"198.51.100.1, unknown, 10.0.0.2"}, {"198.51.100.1,"}, {"localhost"}},
	} {
		for _, lines := range tests {
			got, err := forwardedFor(netip.MustParseAddr("10.0.0.1"), lines, proxies)
			expect(t, fmt.Sprint(lines), got.String(), want)
			expect(t, fmt.Sprint(lines, " is taken"), err == nil, got.IsValid())
		}
	}
	for peer, trusted := range map[string][]netip.Prefix{"10.0.0.1": nil, "203.0.113.9": proxies} {
		got, err := forwardedFor(netip.MustParseAddr(peer), []string{"garbage"}, trusted)
		expect(t, "nobody trusts "+peer, fmt.Sprint(got, err), peer+" <nil>")
	}
}

// FuzzForwardedFor checks that nothing which is written left of the address that
// a trusted proxy saw ever changes what comes out, in how many lines it be.
func FuzzForwardedFor(f *testing.F) {
	for _, spoofed := range []string{"", "127.0.0.1", "10.0.0.1, ", "garbage,[::1]:80", ",,,", "[", "fe80::1%,x"} {
		f.Add(spoofed, uint32(0xc6336401), true)
	}
	f.Fuzz(func(t *testing.T, spoofed string, address uint32, lines bool) {
		trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		hop := netip.AddrFrom4([4]byte{byte(address>>24) | 0x80, byte(address >> 16), byte(address >> 8), byte(address)}) // not 10
		list := []string{spoofed + "," + hop.String(), "10.0.0.2"}
		if lines {
			list = []string{spoofed, hop.String(), "10.0.0.2"}
		}
		if got, err := forwardedFor(netip.MustParseAddr("10.0.0.1"), list, trusted); err != nil || got != hop {
			t.Errorf("%q gives %v, %v, want %v", list, got, err, hop)
		}
		// On its own it may be anything, but no address of another form than ours.
		if got, err := forwardedFor(netip.MustParseAddr("10.0.0.1"), []string{spoofed}, trusted); err == nil && (got != got.Unmap() || got.Zone() != "" || !got.IsValid()) {
			t.Errorf("%q gives %v", spoofed, got)
		}
	})
}

// TestParsePrefix is what an address list may hold.
func TestParsePrefix(t *testing.T) {
	for s, want := range map[string]string{
		"10.1.2.3/8": "10.0.0.0/8", "192.0.2.7": "192.0.2.7/32", "0.0.0.0/0": "0.0.0.0/0", "2001:db8::/32": "2001:db8::/32", "2001:DB8::1": "2001:db8::1/128", "::/0": "::/0",
		"::ffff:192.0.2.7": "192.0.2.7/32", "::ffff:192.0.2.0/120": "192.0.2.0/24", "::ffff:0.0.0.0/96": "0.0.0.0/0", "::ffff:0.0.0.0/95": "", "10.0.0.0/33": "",
		"10.0.0.0/": "", "10.0.0": "", "10.0.0.0/08": "", "fe80::1%eth0": "", "fe80::%eth0/64": "", "localhost": "", "": "",
	} {
		p, err := parsePrefix(s)
		if err == nil && p.String() != want || err != nil && want != "" {
			t.Errorf("%q is %v, %v, want %q", s, p, err, want)
		}
	}
}

// FuzzParsePrefix checks that what is taken is in one form, with no address in
// IPv6 that IPv4 has, and reads the same when it is written again.
func FuzzParsePrefix(f *testing.F) {
	for _, s := range []string{"10.0.0.0/8", "::ffff:1.2.3.4/100", "fe80::1%x", "1.2.3.4", "::/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePrefix(s)
		if err != nil {
			return
		}
		again, err := parsePrefix(p.String())
		if err != nil || again != p || p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "" || !p.Contains(p.Addr()) {
			t.Errorf("%q is %v, and that is %v, %v", s, p, again, err)
		}
	})
}

// TestAddressLists: an address that cannot be told is in no list, and nobody is
// believed who is no trusted proxy. TestRefusalsAreTold has those that can be told.
func TestAddressLists(t *testing.T) {
	const proxied, others = "TRUSTED_PROXIES=192.0.2.0/24", "WEBHOOKS_ALLOWED_IPS=198.51.100.0/24"
	for _, tt := range []struct {
		env       []string
		forwarded string // X-Forwarded-For
		want      []int  // what a webhook gets, and a report
	}{
		{[]string{proxied}, "canary", []int{200, 204}},
		{[]string{proxied, "WEBHOOKS_ALLOWED_IPS=0.0.0.0/0,::/0", "SUBSCRIBE_ALLOWED_IPS=0.0.0.0/0"}, "canary", []int{403, 403}},
		{[]string{"SUBSCRIBE_ALLOWED_IPS=::ffff:192.0.2.0/120", others}, "198.51.100.1", []int{403, 204}},
		{[]string{proxied, others}, "198.51.100.1, 192.0.2.9", []int{200, 204}},
	} {
		relayTest(t, tt.env, func(t *testing.T, r *relay) {
			expect(t, fmt.Sprint(tt.env), []int{r.post("ci", "{}", "X-Forwarded-For", tt.forwarded).status, r.opens("X-Forwarded-For", tt.forwarded)}, tt.want)
		})
	}
}

// TestTokenForms checks the ways a token may come, and that a wrong one gets the
// same answer on every channel, known or not.
func TestTokenForms(t *testing.T) {
	relayTest(t, []string{"AUTH_TOKENS_FILE=" + tokensFile(t, "ci secret\n")}, func(t *testing.T, r *relay) {
		refused := r.ask("GET", "/subscribe/unknown/", "", "X-Auth-Token", "secret")
		refused.refused(t, 401, "missing or wrong token")
		expect(t, "WWW-Authenticate", refused.header.Get("Www-Authenticate"), "Bearer")
		for _, good := range [][]string{{"X-Auth-Token", "secret"}, {"Authorization", "Bearer secret"}, {"Authorization", "bEARER   secret"}} {
			expect(t, fmt.Sprint(good), r.opens(good...), 204)
		}
		for _, bad := range [][]string{
			nil, {"Authorization", "Basic secret"}, {"Authorization", "secret"}, {"X-Auth-Token", "Secret"}, {"X-Auth-Token", "wrong", "Authorization", "Bearer secret"},
		} {
			expect(t, fmt.Sprint(bad), r.ask("GET", "/subscribe/ci/", "", bad...), refused)
		}
	})
}

// Who may send.

// hexMAC and base64MAC are signatures as providers write them.
func hexMAC(key, text string) string { return hex.EncodeToString(macOf(key, text)) }

func base64MAC(key, text string) string { return base64.StdEncoding.EncodeToString(macOf(key, text)) }

func macOf(key, text string) []byte {
	mac := hmac.New(sha256.New, []byte(key))
	io.WriteString(mac, text)
	return mac.Sum(nil)
}

// signer signs webhooks as one provider's documentation says.
type signer struct {
	scheme string
	key    string
	secret string // as it stands in the file
	timed  bool
	sign   func(key, id, stamp, body string) []string // names and values of fields by turns, that of the signature last
}

// ofBody is a signer whose signature of the body alone is in one field.
func ofBody(scheme, header, prefix string, mac func(key, text string) string) *signer {
	return &signer{scheme, "hunter2", "hunter2", false, func(key, _, _, body string) []string { return []string{header, prefix + mac(key, body)} }}
}

// signers has one for every scheme, and for every form of it.
var signers = []*signer{
	ofBody("github", "X-Hub-Signature-256", "sha256=", hexMAC),
	ofBody("gitlab", "X-Gitlab-Token", "", func(key, _ string) string { return key }),
	ofBody("bitbucket", "X-Hub-Signature", "sha256=", hexMAC),
	ofBody("gitea", "X-Gitea-Signature", "", hexMAC),
	ofBody("shopify", "X-Shopify-Hmac-Sha256", "", base64MAC),
	ofBody("hmac-sha256:x-signature", "X-Signature", "sha256=", hexMAC),
	ofBody("hmac-sha256:X-Bare", "X-Bare", "", hexMAC),
	ofBody("hmac-sha256:X-Coded", "X-Coded", "", base64MAC),
	{"stripe", "whsec_hunter2", "whsec_hunter2", true, func(key, _, stamp, body string) []string { // the prefix is part of the key
		return []string{"Stripe-Signature", "t=" + stamp + ",v0=" + hexMAC("test", body) + ",v1=" + hexMAC("old", stamp+"."+body) + ",v1=" + hexMAC(key, stamp+"."+body)}
	}},
	{"slack", "hunter2", "hunter2", true, func(key, _, stamp, body string) []string {
		return []string{"X-Slack-Request-Timestamp", stamp, "X-Slack-Signature", "v0=" + hexMAC(key, "v0:"+stamp+":"+body)}
	}},
	{"standard-webhooks", "hunter2", "whsec_aHVudGVyMg==", true, standardSignature},
	{"standard-webhooks", "hunter2", "aHVudGVyMg==", true, standardSignature},
}

func standardSignature(key, id, stamp, body string) []string {
	text := id + "." + stamp + "." + body
	return []string{"Webhook-Id", id, "Webhook-Timestamp", stamp, "Webhook-Signature", "v1a," + base64MAC("other", text) + " v1," + base64MAC("old", text) + " v1," + base64MAC(key, text)}
}

// secretOf is what a line of channel ci says.
func secretOf(scheme, text string) secret {
	return must(parseSecrets("ci " + scheme + " " + text)).of("ci")[0]
}

// TestSignatureVectors are the examples that the providers' documentation prints:
// of those that schemes cites, and for standard-webhooks
// https://docs.svix.com/receiving/verifying-payloads/how.
func TestSignatureVectors(t *testing.T) {
	const everybody = "It's a Secret to Everybody"
	for _, tt := range []struct {
		scheme, secret string
		at             int64
		body           string
		fields         []string
	}{
		{"github", everybody, 0, "Hello, World!", []string{"X-Hub-Signature-256", "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"}},
		{"bitbucket", everybody, 0, "Hello World!", []string{"X-Hub-Signature", "sha256=a4771c39fbe90f317c7824e83ddef3caae9cb3d976c214ace1f2937e133263c9"}},
		{"slack", "8f742231b10e8888abcd99yyyzzz85a5", 1531420618,
			"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c",
			[]string{"X-Slack-Request-Timestamp", "1531420618", "X-Slack-Signature", "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"}},
		{"standard-webhooks", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", 1614265330, `{"test": 2432232314}`,
			[]string{"Webhook-Id", "msg_p5jXN8AQM9LWM0D4loKWxJek", "Webhook-Timestamp", "1614265330", "Webhook-Signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}},
	} {
		one := secretOf(tt.scheme, strings.ReplaceAll(tt.secret, " ", "_"))
		if tt.secret == everybody { // which no line can hold
			one.key = []byte(everybody)
		}
		for _, end := range []string{"", " "} {
			expect(t, tt.scheme+": the documented signature passes for the body"+end, one.verifies(headerOf(tt.fields...), []byte(tt.body+end), time.Unix(tt.at, 0)), end == "")
		}
	}
}

// TestSignatureForms bends the signatures of every scheme in every way: nothing passes
// but what the provider has signed, lately.
func TestSignatureForms(t *testing.T) {
	const body, id, now = `{"a":1}`, "msg_1", "1700000000"
	at := time.Unix(1700000000, 0)
	for _, s := range signers {
		one := secretOf(s.scheme, s.secret)
		check := func(what string, want bool, fields []string, body string) {
			t.Helper()
			if header := headerOf(fields...); one.verifies(header, []byte(body), at) != want {
				t.Errorf("%s, %s: verifies is %t: %q", s.scheme, what, !want, header)
			}
		}
		own := func() []string { return s.sign(s.key, id, now, body) }
		last, token, anyForm := len(own())-1, s.scheme == "gitlab", strings.HasPrefix(s.scheme, "hmac-sha256:")
		bent := func(what string, want bool, i int, bend func(string) string) {
			fields := own()
			fields[i] = bend(fields[i])
			check(what, want, fields, body)
		}
		check("good", true, own(), body)
		check("forged", false, s.sign("guess", id, now, body), body)
		check("signed with an empty key", false, s.sign("", id, now, body), body)
		check("body changed", token, own(), body+" ")
		check("body cut", token, own(), body[:len(body)-1])
		check("no body", token, own(), "")
		check("nothing", false, nil, body)
		bent("truncated", false, last, func(v string) string { return v[:len(v)-1] })
		bent("truncated by a byte", false, last, func(v string) string { return v[:len(v)-2] })
		bent("longer", false, last, func(v string) string { return v + "00" })
		bent("one bit", false, last, func(v string) string { return v[:len(v)-4] + string(v[len(v)-4]^1) + v[len(v)-3:] })
		bent("re-encoded", anyForm, last, recoded)
		bent("hex in capitals", true, last, func(v string) string { return hexDigits64.ReplaceAllStringFunc(v, strings.ToUpper) })
		bent("something before", false, last, func(v string) string {
			i := max(strings.LastIndex(v, cmp.Or(one.prefix, v)), 0)
			return v[:i] + "v9" + v[i:]
		})
		if prefix := one.prefix; prefix != "" {
			bent("no prefix", anyForm, last, func(v string) string { return strings.ReplaceAll(v, prefix, "") })
			bent("other algorithm", false, last, func(v string) string { return "sha1=" + strings.ReplaceAll(v, prefix, "") })
		}
		for i := 0; i < last; i += 2 {
			name, value := own()[i], own()[i+1]
			check("without "+name, false, slices.Delete(own(), i, i+2), body)
			bent("an empty "+name, false, i+1, func(string) string { return "" })
			check("twice the same "+name, false, append(own(), name, value), body)
			check("another "+name+" too", false, append(own(), name, "x"), body)
		}
		for _, other := range signers {
			if other.scheme != s.scheme {
				check("signed as "+other.scheme, false, other.sign(s.key, id, now, body), body)
			}
		}
		for stamp, want := range map[string]bool{
			"1699999700": true, "1700000300": true, "1699999699": false, "1700000301": false, "0": false, "-1700000000": false, "": false, "now": false,
			"1700000000.5": false, "1700000000000": false, "9223372036854775807": false, "-9223372036854775808": false, "18446744075409551616": false, "0x6553f100": false,
		} {
			check("at "+stamp, want || !s.timed, s.sign(s.key, id, stamp, body), body)
		}
	}
	standard := secretOf("standard-webhooks", "whsec_aHVudGVyMg==")
	moved := standardSignature("hunter2", "msg", "1", now+".x") // what is signed reads as another id, time and body, too
	moved[1], moved[3] = "msg.1", now
	expect(t, "standard-webhooks: part of the body for the time of an old signature", standard.verifies(headerOf(moved...), []byte("x"), at), false)
	stripe, old := secretOf("stripe", "hunter2"), "1600000000"
	for _, value := range []string{
		"t=" + old + ",t=" + now + ",v1=" + hexMAC("hunter2", old+"."+body), "t=" + now + ",t=" + old + ",v1=" + hexMAC("hunter2", old+"."+body),
		"v1=" + hexMAC("hunter2", "."+body), "t=" + now + ",v0=" + hexMAC("hunter2", now+"."+body), "t=" + now, ",,,", "t=,v1=",
	} {
		expect(t, "stripe: "+value, stripe.verifies(headerOf("Stripe-Signature", value), []byte(body), at), false)
	}
}

// hexDigits64 and base64Digest are digests as they are written.
var (
	hexDigits64  = regexp.MustCompile("[0-9a-f]{64}$")
	base64Digest = regexp.MustCompile("[A-Za-z0-9+/]{43}=$")
)

// recoded writes the digest at the end of value in base64 if it is in hex, and the
// other way round.
func recoded(value string) string {
	if digits := hexDigits64.FindString(value); digits != "" {
		raw, _ := hex.DecodeString(digits)
		return strings.TrimSuffix(value, digits) + base64.StdEncoding.EncodeToString(raw)
	}
	if coded := base64Digest.FindString(value); coded != "" {
		raw, _ := base64.StdEncoding.DecodeString(coded)
		return strings.TrimSuffix(value, coded) + hex.EncodeToString(raw)
	}
	return base64.StdEncoding.EncodeToString([]byte(value))
}

// FuzzSignature states that nothing passes but what holds the digest that the
// provider would have made, in hex or base64, and that nothing panics.
func FuzzSignature(f *testing.F) {
	now := time.Unix(1700000000, 0)
	for i, s := range signers {
		fields := s.sign(s.key, "msg_1", "1700000000", "{}")
		f.Add(uint(i), fields[len(fields)-1], "msg_1", "1700000000", "{}")
		f.Add(uint(i), recoded(fields[len(fields)-1]), "msg.1", "1700000300", "")
		f.Add(uint(i), "t=1700000000,v1=,v1", "", "-1", "{}")
	}
	f.Fuzz(func(t *testing.T, i uint, value, id, stamp, body string) {
		s := signers[i%uint(len(signers))]
		one := secretOf(s.scheme, s.secret)
		header := http.Header{one.header: {value}, cmp.Or(one.id, "X-Id"): {id}}
		if s.scheme == "stripe" {
			_, stamp, _ = strings.Cut(","+value, ",t=")
			stamp, _, _ = strings.Cut(stamp, ",")
		} else if s.timed {
			header[one.stamp] = []string{stamp}
		}
		if !one.verifies(header, []byte(body), now) {
			return
		}
		fields := s.sign(s.key, id, stamp, body)
		digest := fields[len(fields)-1]
		digest = digest[strings.LastIndexAny(strings.TrimRight(digest, "="), "=,")+1:]
		lower, other := strings.ToLower(value), strings.TrimPrefix(recoded(digest), "sha256=")
		if !strings.Contains(value, digest) && !strings.Contains(lower, digest) && !strings.Contains(value, other) && !strings.Contains(lower, other) {
			t.Errorf("%s: %q passes for %q", s.scheme, header, body)
		}
		if seconds, err := strconv.ParseInt(stamp, 10, 64); s.timed && (err != nil || seconds < now.Unix()-300 || seconds > now.Unix()+300) {
			t.Errorf("%s: the time %q passes", s.scheme, stamp)
		}
	})
}

// TestParseSecrets is the form of a secrets file. What is malformed is refused as
// a whole, and never quoted.
func TestParseSecrets(t *testing.T) {
	const bad = "ci github hunter2\n" // and what is wrong in line 2
	for err, texts := range map[string][]string{
		"<nil>": {"ci github hunter2", "\uFEFF# comment\n\n ci\tgithub hunter2 \r\n* gitea hunter2\nci github hunter3\n", "ci hmac-sha256:X-Hub-Signature-256 hunter2 unsigned-get",
			"ci standard-webhooks aHVudGVyMg=="},
		"says nothing":            {"", "# ci github hunter2\n"},
		"line 2: invalid channel": {bad + "c/i github hunter2"},
		"line 2: want a channel, a scheme, a secret, and maybe unsigned-get": {bad + "ci", bad + "ci github", bad + "ci github unsigned-get", bad + "ci github hunter2 unsigned",
			bad + "ci github hunter2 hunter3 unsigned-get"},
		"line 2: want a scheme: github, gitlab, bitbucket, gitea, stripe, slack, shopify, standard-webhooks, hmac-sha256:Header-Name": {bad + "ci hunter2 hunter2",
			bad + "ci GitHub hunter2", bad + "ci github:X-Other hunter2", bad + "ci hmac-sha256 hunter2", bad + "ci hmac-sha256: hunter2", bad + "ci hmac-sha256:X:Y hunter2",
			bad + "ci hmac-sha256:host hunter2", bad + "ci hmac-sha256:X\u00e9 hunter2"},
		"line 2: want a secret in base64, behind whsec_ or not": {bad + "ci standard-webhooks hunter2!", bad + "ci standard-webhooks whsec_", bad + "ci standard-webhooks whsec_aHVudGVyMg"},
	} {
		for _, text := range texts {
			all, got := parseSecrets(text)
			expect(t, text, fmt.Sprint(got), err)
			if got == nil && (len(all.of("ci")) == 0 || len(all.of("ci")[0].key) == 0) {
				t.Errorf("%q: says nothing of the channel", text)
			}
		}
	}
}

// TestOnlyTheProviderGetsIn: what is not signed gets no further, and no secret is told.
// unsigned-get lets through what has no body. The bytes that came are what is signed.
func TestOnlyTheProviderGetsIn(t *testing.T) {
	zipped := gzipped(t, "{}")
	file := tokensFile(t, "ci gitea hunter2\nci gitea hunter3 unsigned-get\nstrict gitea hunter2\n* gitea for-all-others\n")
	relayTest(t, []string{"WEBHOOK_SECRETS_FILE=" + file, "LOG_LEVEL=debug"}, func(t *testing.T, r *relay) {
		streams := map[string]*listener{"ci": r.listen("ci", features...), "strict": r.listen("strict", features...), "any": r.listen("any", features...)}
		arrived := map[string]int{}
		for _, tt := range []struct {
			method, channel, body, key string
			ok                         bool
		}{
			{"GET", "ci", "", "", true},
			{"HEAD", "ci", "", "", true},
			{"OPTIONS", "ci", "", "", true},
			{"GET", "ci", "{}", "", false},
			{"GET", "ci", "{}", "hunter2", true},
			{"POST", "ci", "", "", false},
			{"DELETE", "ci", "", "", false},
			{"POST", "ci", "", "hunter2", true},
			{"POST", "ci", "{}", "hunter3", true},
			{"POST", "ci", zipped, "hunter2", true},
			{"GET", "strict", "", "", false},
			{"POST", "strict", "{}", "for-all-others", false},
			{"POST", "strict", "{}", "hunter2", true},
			{"POST", "any", "{}", "for-all-others", true},
			{"POST", "any", "{}", "hunter2", false},
		} {
			headers := []string{"Content-Encoding", map[bool]string{true: "gzip", false: "identity"}[tt.body == zipped]}
			if tt.key != "" {
				headers = append(headers, "X-Gitea-Signature", hexMAC(tt.key, tt.body))
			}
			if got := r.ask(tt.method, "/webhooks/"+tt.channel+"?x=1", tt.body, headers...); tt.ok {
				arrived[tt.channel]++
				got.is(t, 200, "")
			} else {
				got.refused(t, 401, "missing or wrong signature")
				expect(t, "id", got.header["X-Relay-Event-Id"], nil)
			}
		}
		synctest.Wait()
		for channel, stream := range streams {
			expect(t, "webhooks of "+channel, len(stream.got("webhook")), arrived[channel])
		}
		expect(t, "a secret is in the log", regexp.MustCompile("hunter|for-all-others").MatchString(r.log.String()), false)
	})
}

// TLS.

// TestClientCertificates: streams and reports are for those whom the authority knows,
// and a token does not replace a certificate; webhooks are for everybody. When a
// certificate is not good any more its connection ends, so that the client comes with
// its new one, and when its authority is not its streams do.
func TestClientCertificates(t *testing.T) {
	for name, protocol := range map[string]string{"HTTP1": "http/1.1", "HTTP2": "h2"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			certFile, keyFile, file := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), filepath.Join(dir, "ca.crt")
			inBubble(t, func(t *testing.T) {
				// Who closes a connection says so, for at most five seconds, which
				// nobody hears when both ends close a pipe at once. The clients
				// go first, as net/http's server would hold a lock meanwhile.
				parting := func() { time.Sleep(6 * time.Second) }
				t.Cleanup(parting)
				root, next := newAuthority(t, nil), newAuthority(t, nil)
				replace(t, file, root.pem)
				writeCertificate(t, certFile, keyFile, 1)
				env := []string{"AUTH_TOKEN=secret", "SERVER_TLS_CERT_FILE=" + certFile, "SERVER_TLS_KEY_FILE=" + keyFile, "SERVER_TLS_CLIENT_CA_FILE=" + file}
				config := must(configOf(t, append(env, "RELAY_MODE=server")...).serverTLS(slog.New(slog.DiscardHandler)))
				config.NextProtos = []string{protocol}
				p := newPipes()
				r := newRig(t, tls.NewListener(p, config), env...)
				t.Cleanup(parting)
				as := func(pair *tls.Certificate) *relay { // in use is whatever *pair is
					as := &relay{rig: r, t: t, rt: p.transport(t, false), base: "https://relay.test"}
					as.rt.Protocols.SetHTTP2(true)
					as.rt.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }}
					return as
				}
				token := []string{"X-Auth-Token", "secret"}

				nobody := as(&tls.Certificate{})
				nobody.post("ci", "{}").is(t, 200, "")
				expect(t, "report without a certificate", nobody.opens(token...), 401)
				nobody.ask("GET", "/subscribe/ci/", "", token...).refused(t, 401, "missing or wrong certificate")
				expect(t, "counted", r.Rejected["certificate"].Load(), 2)

				pair := root.pair(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
				old, ours := *pair, as(pair)
				expect(t, "good", ours.opens(token...), 204)
				ours.ask("GET", "/subscribe/ci/", "", "X-Auth-Token", "wrong").refused(t, 401, "missing or wrong token")
				time.Sleep(30 * time.Second)
				*pair = *root.pair(t, nil)
				expect(t, "on the connection of the old one", ours.opens(token...), 204)
				time.Sleep(31 * time.Second)
				expect(t, "when that has expired", ours.opens(token...), 401)
				expect(t, "on the next connection", ours.opens(token...), 204)
				expired := as(&old)
				expect(t, "with the old one again", expired.opens(token...), 401)

				theirs, stream := as(next.pair(t, nil)), ours.listen("ci", token...)
				check := func(what string, text []byte, want ...int) {
					t.Helper()
					replace(t, file, text)
					time.Sleep(2*reloadInterval + time.Second)
					expect(t, what+": ours, theirs, streams", []int{ours.opens(token...), theirs.opens(token...), r.streamCount()}, want)
				}
				check("both", slices.Concat(root.pem, next.pem), 204, 204, 1)
				check("half of one", next.pem[:len(next.pem)/2], 204, 204, 1)
				check("the next", next.pem, 401, 204, 0)
				stream.endedAt(t)
				expect(t, "reason", r.endings(), []any{errRevoked.Error()})
			})
		})
	}
}

// TestIssued is which certificates are good.
func TestIssued(t *testing.T) {
	root, stranger := newAuthority(t, nil), newAuthority(t, nil)
	between := newAuthority(t, root)
	for what, pair := range map[string]*tls.Certificate{
		"good":                   root.pair(t, nil),
		"good, in between":       between.pair(t, nil, between),
		"none":                   {},
		"without the one before": between.pair(t, nil),
		"of a stranger":          stranger.pair(t, nil),
		"with its authority":     stranger.pair(t, nil, stranger),
		"self-signed":            (*authority)(nil).pair(t, nil),
		"expired":                root.pair(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }),
		"of the future":          root.pair(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		"for servers":            root.pair(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }),
	} {
		var chain []*x509.Certificate
		for _, der := range pair.Certificate {
			chain = append(chain, must(x509.ParseCertificate(der)))
		}
		expect(t, what, issued(chain, must(parseIssuers(string(root.pem)))), strings.HasPrefix(what, "good"))
	}
}

// TestParseIssuers: all that is in PEM must be a certificate; one that is cut would
// lock its subscribers out.
func TestParseIssuers(t *testing.T) {
	one, two := string(newAuthority(t, nil).pem), string(newAuthority(t, nil).pem)
	for text, want := range map[string]string{
		"# ours\n" + one + "# theirs\n" + two: "<nil>",
		"":                                    "must hold PEM certificates", "hunter2\n": "must hold PEM certificates",
		one[:len(one)/2]: "must hold PEM certificates, and nothing else in PEM", one + two[:len(two)-20]: "must hold PEM certificates, and nothing else in PEM",
		one + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "must hold PEM certificates, and nothing else in PEM",
		one + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n": "x509: malformed certificate",
	} {
		_, err := parseIssuers(text)
		expect(t, text, fmt.Sprint(err), want)
	}
}

// TestServerCertificate is renewed and then broken: the last good one stays. What is
// older than TLS 1.2 is not spoken.
func TestServerCertificate(t *testing.T) {
	dir, said := t.TempDir(), &logBuffer{}
	c := &Config{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	writeCertificate(t, c.CertFile, c.KeyFile, 1)
	config := must(c.serverTLS(newLogger(c, said)))
	expect(t, "lowest version", config.MinVersion, tls.VersionTLS12)
	serial := func(when string, want int64, errs int) {
		t.Helper()
		got := must(x509.ParseCertificate(must(config.GetCertificate(nil)).Certificate[0]))
		expect(t, when+": serial number", got.SerialNumber.Int64(), want)
		expect(t, when+": errors", len(said.lines("file kept as it was")), errs)
	}
	serial("first", 1, 0)
	writeCertificate(t, c.CertFile, c.KeyFile, 2)
	serial("renewed", 2, 0)
	replace(t, c.CertFile, []byte("-----BEGIN CERTIFICATE-----\nnonsense"))
	serial("broken", 2, 1)
	os.Remove(c.CertFile)
	serial("removed", 2, 2)
	syscall.Mkfifo(c.CertFile, 0o600)
	serial("a pipe", 2, 3)
	writeCertificate(t, c.CertFile, filepath.Join(dir, "its.key"), 3)
	serial("with the key of another", 2, 4)
	serial("the same", 2, 4)
	os.Rename(filepath.Join(dir, "its.key"), c.KeyFile)
	serial("mended", 3, 4)
	cert, key := readFile(t, c.CertFile), readFile(t, c.KeyFile)
	replace(t, c.CertFile, []byte(key))
	replace(t, c.KeyFile, []byte(cert))
	serial("the two changed about", 3, 5)
	for _, file := range []string{c.CertFile, c.KeyFile} { // without a last line end, too
		replace(t, file, []byte(cert+strings.TrimSpace(key)))
	}
	serial("both in one", 3, 5)
	expect(t, "certificates of the chain", len(must(config.GetCertificate(nil)).Certificate), 1)
}

// Smuggling. What one side takes for one request must be one on the other.

// TestSmugglingIn sends what parsers disagree on over a raw connection. Whatever
// is taken becomes one event with one reading; nothing else becomes any.
func TestSmugglingIn(t *testing.T) {
	t.Parallel()
	const (
		first   = "POST /webhooks/ci/x HTTP/1.1\r\nHost: relay\r\n"
		second  = "POST /webhooks/ci/second HTTP/1.1\r\nHost: relay\r\nContent-Length: 0\r\n\r\n"
		chunked = "Transfer-Encoding: chunked\r\n"
		ab      = "\r\n2\r\nab\r\n0\r\n\r\n"
	)
	l := loopback(t)
	newRig(t, l)
	addr := l.Addr().String()
	stream := listen(t, afresh, "http://"+addr+"/subscribe/ci")
	before := 0
	for _, tt := range []struct {
		name, request string
		statuses      string
		bodies        string // of the events, each behind its path
		header, value string // of the first event; "" when it must be absent
	}{
		{"plain", first + "Content-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "Content-Length", ""},
		{"repeated length", first + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "", ""},
		{"conflicting lengths", first + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nab" + second, "400", "", "", ""},
		{"signed length", first + "Content-Length: +2\r\n\r\nab" + second, "400", "", "", ""},
		// Whoever stands in front may have seen another end of these (RFC 9112 section 6.3).
		{"length and chunks", first + "Content-Length: 3\r\n" + chunked + ab + second, "200", "x:ab", "Content-Length", ""},
		{"chunks and length", first + chunked + "Content-Length: 12\r\n\r\n2\r\nab\r\n0\r\n\r\n" + second, "200", "x:ab", "Content-Length", ""},
		{"length and chunks, refused", "POST /webhooks/c@i/x HTTP/1.1\r\nHost: relay\r\nContent-Length: 3\r\n" + chunked + ab + second, "400", "", "", ""},
		{"length and chunks of another page", "GET / HTTP/1.1\r\nHost: relay\r\nContent-Length: 3\r\n" + chunked + ab + second, "200", "", "", ""},
		{"chunks", first + chunked + "\r\n1\r\na\r\n1;ext=1\r\nb\r\n0\r\n\r\n" + second, "200", "x:ab", "Transfer-Encoding", ""},
		{"chunks twice", first + chunked + chunked + ab + second, "501", "", "", ""},
		{"chunks misspelt", first + "Transfer-Encoding: xchunked\r\n\r\n2\r\nab\r\n0\r\n\r\n" + second, "501", "", "", ""},
		{"blank before the colon", first + "Transfer-Encoding : chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n" + second, "400", "", "", ""},
		{"chunk beyond 64 bits", first + chunked + "\r\n10000000000000002\r\nab\r\n0\r\n\r\n" + second, "400", "", "", ""},
		{"chunk longer than it says", first + chunked + "\r\n1\r\nab\r\n0\r\n\r\n" + second, "400", "", "", ""},
		{"obsolete folding", first + "X-A: one\r\n two\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "X-A", "one two"},
		{"folding first", "POST /webhooks/ci/x HTTP/1.1\r\n Host: relay\r\n\r\n" + second, "400", "", "", ""},
		{"bare LF", strings.ReplaceAll(first+"X-A: 1\r\nContent-Length: 2\r\n\r\n", "\r", "") + "ab" + second, "200 200", "x:ab second:", "X-A", "1"},
		{"bare CR in a value", first + "X-A: 1\rX-B: 2\r\nContent-Length: 0\r\n\r\n" + second, "400", "", "", ""},
		{"NUL in a value", first + "X-A: 1\x00\r\nContent-Length: 0\r\n\r\n" + second, "400", "", "", ""},
		{"no host", "POST /webhooks/ci/x HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + second, "400", "", "", ""},
		{"two hosts", first + "Host: other\r\nContent-Length: 0\r\n\r\n" + second, "400", "", "", ""},
		{"named by Connection", first + "Connection: X-Named, keep-alive\r\nX-Named: 1\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "X-Named", ""},
		{"host named by Connection", first + "Connection: Host, Content-Length\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "Host", "relay"},
		{"upgrade", first + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "Http2-Settings", ""},
		{"websocket", first + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nContent-Length: 0\r\n\r\n" + second, "200 200", "x: second:", "Upgrade", ""},
		{"trailer", first + chunked + "Trailer: X-T\r\n\r\n2\r\nab\r\n0\r\nX-T: 1\r\n\r\n" + second, "200", "x:ab", "X-T", ""},
		{"trailer of framing", first + chunked + "Trailer: Content-Length\r\n\r\n2\r\nab\r\n0\r\nContent-Length: 9\r\n\r\n" + second, "400", "", "", ""},
		{"forged event id", first + "X-Relay-Event-Id: forged\r\nx-relay-EVENT-id: forged\r\nContent-Length: 0\r\n\r\n", "200", "x:", "X-Relay-Event-Id", ""},
		{"body of a GET", "GET /webhooks/ci/x HTTP/1.1\r\nHost: relay\r\nContent-Length: 2\r\n\r\nab" + second, "200 200", "x:ab second:", "", ""},
		{"chunks, which HTTP/1.0 does not know", "POST /webhooks/ci/x HTTP/1.0\r\n" + chunked + ab, "200", "x:", "Transfer-Encoding", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var statuses, bodies []string
			for _, m := range regexp.MustCompile(`HTTP/1\.[01] (\d{3})`).FindAllStringSubmatch(exchange(t, addr, tt.request), -1) {
				statuses = append(statuses, m[1])
			}
			// A webhook of our own ends what came of the request.
			post(t.Context(), afresh, "POST", "http://"+addr+"/webhooks/ci/end", "").is(t, 200, "")
			value := ""
			for {
				before++
				w := stream.next(t, before).webhook(t)
				path := strings.TrimPrefix(w.Path, "/webhooks/ci/")
				if path == "end" {
					break
				}
				if bodies = append(bodies, path+":"+string(w.Body)); len(bodies) == 1 {
					for _, h := range w.Headers {
						if h.Name == tt.header {
							value = strings.Join(h.Values, "|")
						}
					}
				}
			}
			got := []string{strings.Join(statuses, " "), strings.Join(bodies, " "), value}
			expect(t, "statuses, events, "+tt.header, got, []string{tt.statuses, tt.bodies, tt.value})
		})
	}
}

// Benchmarks. Each stands beside a bare reference in the same run: what
// net/http alone does when it reads the body, answers 200 and writes bytes
// that were formatted beforehand.

// githubBody is a push event as GitHub sends it, of n bytes.
func githubBody(n int) []byte {
	commit := `{"id":"7fd1a60b01f91b314f59955a4e4d4e80d8edf11d","message":"Fix the \"frobnicator\"\n\nIt was <broken> & slow","timestamp":"2026-01-02T03:04:05+01:00","url":"https://github.com/octo/relay/commit/7fd1a60b","author":{"name":"Zoë Ünal","email":"zoe@example.com"},"added":["a/b.go"],"removed":[],"modified":["README.md"]}`
	b := []byte(`{"ref":"refs/heads/main","repository":{"id":1296269,"full_name":"octo/relay"},"commits":[` + commit)
	for len(b) < n {
		b = append(b, ","+commit...)
	}
	return append(b[:n-4], `"}]}`...)
}

// benchSecret signs what benchmarks send.
const benchSecret = "hunter2"

// webhookRequest is the raw request that carries body to channel bench.
func webhookRequest(body []byte) []byte {
	return append(fmt.Appendf(nil, "POST /webhooks/bench/github HTTP/1.1\r\nHost: relay.example.com\r\nUser-Agent: GitHub-Hookshot/9729b30\r\n"+
		"Accept: */*\r\nContent-Type: application/json\r\nX-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-4c9367dc0958\r\nX-GitHub-Event: push\r\n"+
		"X-GitHub-Hook-ID: 292430182\r\nX-Hub-Signature-256: sha256=%s\r\n"+
		"Content-Length: %d\r\n\r\n", hexMAC(benchSecret, string(body)), len(body)), body...)
}

const subscribeRequest = "GET /subscribe/bench/ HTTP/1.1\r\nHost: relay.example.com\r\nAccept: text/event-stream\r\nX-Relay-Features: http\r\n\r\n"

// eventOfRequest is the event that the request becomes.
func eventOfRequest(request []byte) *Event {
	r, _ := http.ReadRequest(bufio.NewReader(bytes.NewReader(request)))
	body, _ := io.ReadAll(r.Body)
	return eventOf("bench", &Webhook{
		ID: newID(testReplica), Method: r.Method, Path: r.URL.Path, Body: body, Time: time.Now(), Mode: modeAccept,
		Headers: append(endToEnd(r.Header), Header{"Host", []string{r.Host}}),
	})
}

// linesOf is how many lines b has; the ends of chunks and of their sizes, which are
// CRLF, do not count, and nothing that benchmarks send has another CR.
func linesOf(b []byte) int { return bytes.Count(b, []byte("\n")) - bytes.Count(b, []byte("\r")) }

// bareHandler writes to every subscriber what encode makes of each request.
type bareHandler struct {
	encode func(body io.Reader, header http.Header) []byte
	mu     sync.Mutex // a frame is not cut by another one
	conns  []net.Conn
}

func (h *bareHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"+readyFrame(5*time.Second))
		h.mu.Lock()
		h.conns = append(h.conns, conn)
		h.mu.Unlock()
		return
	}
	frame := h.encode(r.Body, r.Header)
	h.mu.Lock()
	for _, conn := range h.conns {
		conn.Write(frame)
	}
	h.mu.Unlock()
	w.WriteHeader(http.StatusOK)
}

// load is a number of keep-alive senders and streams at one address. It costs
// no more than the system calls.
type load struct {
	tb      testing.TB
	request []byte
	senders []net.Conn
	streams []chan int      // each takes how many lines are to come
	reading sync.WaitGroup  // streams that wait for theirs
	took    []time.Duration // of each request
}

// untimed is a connection for a benchmark, which may take its time.
func untimed(tb testing.TB, addr string) net.Conn {
	conn := connect(tb, addr)
	conn.SetDeadline(time.Time{})
	return conn
}

// untimedStream is one that has had its ready event.
func untimedStream(tb testing.TB, addr, subscribe string) net.Conn {
	tb.Helper()
	conn, b := untimed(tb, addr), make([]byte, 512)
	io.WriteString(conn, subscribe)
	for head := ""; !strings.Contains(head, "}\n\n"); {
		n, err := conn.Read(b)
		if head += string(b[:n]); err != nil {
			tb.Fatalf("stream: %v after %q", err, head)
		}
	}
	return conn
}

func newLoad(tb testing.TB, addr string, request []byte, subscribe string, senders, streams int) *load {
	tb.Helper()
	l := &load{tb: tb, request: request}
	for range senders {
		l.senders = append(l.senders, untimed(tb, addr))
	}
	for range streams {
		conn, lines := untimedStream(tb, addr, subscribe), make(chan int)
		go func() { // ends with the load
			b := make([]byte, 32<<10)
			for want := range lines {
				for want > 0 {
					n, err := conn.Read(b)
					if want -= linesOf(b[:n]); err != nil {
						tb.Error(err)
						break
					}
				}
				l.reading.Done()
			}
		}()
		tb.Cleanup(func() { close(lines) })
		l.streams = append(l.streams, lines)
	}
	return l
}

// run sends n requests and waits until each stream has had n frames of so many lines.
func (l *load) run(n, lines int) {
	l.reading.Add(len(l.streams))
	for _, stream := range l.streams {
		stream <- n * lines
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, conn := range l.senders {
		wg.Go(func() {
			took, b := make([]time.Duration, n/len(l.senders)), make([]byte, 4<<10)
			for i := range took {
				begin := time.Now()
				conn.Write(l.request)
				if n, err := conn.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 200")) || !bytes.HasSuffix(b[:n], []byte("\r\n\r\n")) {
					l.tb.Errorf("answer: %v %q", err, b[:n])
					return
				}
				took[i] = time.Since(begin)
			}
			mu.Lock()
			defer mu.Unlock()
			l.took = append(l.took, took...)
		})
	}
	wg.Wait()
	l.reading.Wait()
}

// turns is how often ours and bare alternate in one iteration, so that a
// disturbance of the machine meets both.
const turns = 5

// duel runs ours and bare, n units of work each, by turns. It reports both
// rates, the median of the turns' ratios, and the allocations of ours.
//
// The figures in the comments of benchmarks, ours first, are of
//
//	go test -run '^$' -bench . -benchtime 3s .
//
// on two cores of a virtual machine (Intel Xeon), with Go 1.26.8.
func duel(b *testing.B, unit string, n int, ours, bare func()) {
	ours()
	bare()
	var oursTook, bareTook time.Duration
	var ratios []float64
	var before, after runtime.MemStats
	var mallocs uint64
	for b.Loop() {
		for range turns {
			runtime.ReadMemStats(&before)
			begin := time.Now()
			ours()
			o := time.Since(begin)
			runtime.ReadMemStats(&after)
			mallocs += after.Mallocs - before.Mallocs
			begin = time.Now()
			bare()
			r := time.Since(begin)
			oursTook, bareTook = oursTook+o, bareTook+r
			ratios = append(ratios, float64(r)/float64(o))
		}
	}
	slices.Sort(ratios)
	total := float64(len(ratios) * n)
	b.ReportMetric(total/oursTook.Seconds(), unit+"/s")
	b.ReportMetric(total/bareTook.Seconds(), "bare-"+unit+"/s")
	b.ReportMetric(float64(mallocs)/total, "allocs/"+unit)
	b.ReportMetric(ratios[len(ratios)/2], "ratio")
	b.ReportMetric(0, "ns/op") // of a number of turns, which means nothing
}

// quiet keeps heartbeats out of the count of lines.
const quiet = "SERVER_HEARTBEAT_INTERVAL=5m"

// streaming is n webhooks with such a body by senders to that many streams.
type streaming struct {
	unit                      string
	body, senders, streams, n int
	strictly                  bool // each is sent when all streams have the one before
	legacy                    bool // the streams announce nothing; bare is net/http with encoding/json
	env                       []string
}

func (s streaming) run(b *testing.B) {
	request := webhookRequest(githubBody(s.body))
	event := eventOfRequest(request)
	frame, subscribe := block(event.chunk), subscribeRequest
	made, bareLines := frame, linesOf(frame)
	bare := &bareHandler{encode: func(body io.Reader, _ http.Header) []byte {
		io.Copy(io.Discard, body)
		return made
	}}
	if s.legacy {
		plain := plainOf(must(decodeOwn("webhook", event.ID, onlyMessage(b, frame).data)))
		frame, subscribe, bareLines = []byte(legacyFrame(event)), strings.Replace(subscribe, "X-Relay-Features: http\r\n", "", 1), 2
		bare.encode = func(body io.Reader, header http.Header) []byte {
			hook := plain
			hook.Headers, hook.Body = map[string]string{}, string(must(io.ReadAll(body)))
			for name, values := range header {
				hook.Headers[strings.ToLower(name)] = values[0]
			}
			return fmt.Appendf(nil, "data: %s\n\n", must(json.Marshal(hook)))
		}
	}
	l, bl := loopback(b), loopback(b)
	newRig(b, l, append(s.env, quiet)...)
	serveOn(b, &http.Server{Handler: bare}, bl)
	run := func(l net.Listener, lines int) func() {
		loaded := newLoad(b, l.Addr().String(), request, subscribe, s.senders, s.streams)
		if s.strictly {
			return times(s.n, func() { loaded.run(1, lines) })
		}
		return func() { loaded.run(s.n, lines) }
	}
	duel(b, s.unit, s.n, run(l, linesOf(frame)), run(bl, bareLines))
}

// BenchmarkIngest is a 10 KiB push event by 8 senders to 1 subscriber, beside
// net/http that reads the body and writes bytes made beforehand: 47,500 and 70,100
// a second.
func BenchmarkIngest(b *testing.B) {
	streaming{unit: "request", body: 10 << 10, senders: 8, streams: 1, n: 2000}.run(b)
}

// BenchmarkTold is what it costs to tell of each webhook: BenchmarkIngest with
// lines in the log and on the status page, beside one without: 47,900 and 48,200 a
// second, both with 50 allocations.
func BenchmarkTold(b *testing.B) {
	request := webhookRequest(githubBody(10 << 10))
	lines := linesOf(block(eventOfRequest(request).chunk))
	load := func(level string) (*rig, func()) {
		l := loopback(b)
		r := newRig(b, l, quiet, "LOG_LEVEL="+level)
		loaded := newLoad(b, l.Addr().String(), request, subscribeRequest, 8, 1)
		return r, func() { loaded.run(2000, lines) }
	}
	r, told := load("info")
	r.Note = noteIn(&Journal[Passage]{})
	_, silent := load("error")
	duel(b, "request", 2000, told, silent)
}

// BenchmarkIngestSigned is BenchmarkIngest with signatures that are checked.
func BenchmarkIngestSigned(b *testing.B) {
	secrets := "WEBHOOK_SECRETS_FILE=" + tokensFile(b, "bench github "+benchSecret+"\n")
	streaming{unit: "request", body: 10 << 10, senders: 8, streams: 1, n: 2000, env: []string{secrets}}.run(b)
}

// BenchmarkVerify is the check alone, of a 10 KiB push event.
func BenchmarkVerify(b *testing.B) {
	body, one := githubBody(10<<10), secretOf("github", benchSecret)
	header := headerOf(one.header, "sha256="+hexMAC(benchSecret, string(body)))
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if !one.verifies(header, body, time.Time{}) {
			b.Fatal("refused")
		}
	}
}

// BenchmarkFanout is 1 KiB events to 500 subscribers: as fast as they come, and
// each when all have the one before; beside the same as Ingest: 2,690 and 728 a
// second, 350 and 402.
func BenchmarkFanout(b *testing.B) {
	b.Run("bursts", streaming{unit: "event", body: 1 << 10, senders: 8, streams: 500, n: 160}.run)
	b.Run("strictly", streaming{unit: "event", body: 1 << 10, senders: 1, streams: 500, n: 160, strictly: true}.run)
}

// BenchmarkLegacy is for a subscriber that announces nothing: making the form
// that it reads, beside encoding/json alone; and a 10 KiB push event by 8 senders
// to one of them, beside net/http with encoding/json: 17,200 and 17,900 a second.
func BenchmarkLegacy(b *testing.B) {
	b.Run("form", func(b *testing.B) {
		e := eventOfRequest(webhookRequest(githubBody(10 << 10)))
		plain := plainOf(must(decodeOwn("webhook", e.ID, onlyMessage(b, block(e.chunk)).data)))
		form := func() { must(openEvent("bench", e.wire)).legacyChunk() }
		duel(b, "event", 200, times(200, form), times(200, func() { json.Marshal(plain) }))
	})
	b.Run("stream", streaming{unit: "event", body: 10 << 10, senders: 8, streams: 1, n: 1000, legacy: true}.run)
}

// bareMain is net/http with an event stream as its documentation would have
// it, for BenchmarkIdleStream. It announces its address as the program does.
func bareMain() {
	l := must(net.Listen("tcp", ":0"))
	slog.New(slog.NewJSONHandler(os.Stderr, nil)).Info("listening", "addr", l.Addr().String())
	http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, readyFrame(5*time.Second))
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
}

// BenchmarkIdleStream is the resident memory of one idle HTTP/1.1 stream at
// 2,000 of them, in a process of its own, beside net/http: 7.4 and 28.1 kB.
func BenchmarkIdleStream(b *testing.B) {
	const streams = 2000
	perStream := func(main string) float64 {
		p := launch(b, []string{"RELAY_TEST_MAIN=" + main, "RELAY_MODE=server", "LOG_LEVEL=info"}) // it tells its address
		defer p.cmd.Process.Kill()
		p.logged(b, "listening")
		_, port, _ := net.SplitHostPort(p.stderr.lines("listening")[0]["addr"].(string))
		before := residentBytes(b, p.cmd.Process.Pid)
		for range streams {
			defer untimedStream(b, "127.0.0.1:"+port, subscribeRequest).Close()
		}
		return float64(residentBytes(b, p.cmd.Process.Pid)-before) / streams
	}
	var ours, bare, n float64
	for b.Loop() {
		ours += perStream("1")
		bare += perStream("bare")
		n++
	}
	b.ReportMetric(ours/n, "bytes/stream")
	b.ReportMetric(bare/n, "bare-bytes/stream")
	b.ReportMetric(bare/ours, "ratio")
	b.ReportMetric(0, "ns/op")
}

// residentBytes is VmRSS of a process.
func residentBytes(tb testing.TB, pid int) int64 {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		lacking.skip(tb, "/proc", "run them on Linux")
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	return must(strconv.ParseInt(strings.Fields(rest)[0], 10, 64)) << 10
}

// BenchmarkStatusRoundTrip is webhook, stream, forward, report, answer, beside a
// reverse proxy. 1 sender: p50 93 µs and p99 0.8 ms, 44 µs and 0.9 ms. 64 senders:
// 13,700 a second with 140 µs of CPU each, 19,100 with 97.
func BenchmarkStatusRoundTrip(b *testing.B) { benchmarkRoundTrip(b, modeStatus) }

// BenchmarkAcceptRoundTrip is webhook, answer, stream, forward until the target has
// all, beside a reverse proxy; cpu is what all of it takes for one webhook. 1 sender:
// 12,600 a second with 110 µs of CPU each, 14,700 with 77. 64 senders: 15,600 with
// 120, 20,700 with 91.
func BenchmarkAcceptRoundTrip(b *testing.B) { benchmarkRoundTrip(b, modeAccept) }

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func benchmarkRoundTrip(b *testing.B, mode string) {
	request := webhookRequest(githubBody(10 << 10))
	for _, senders := range []int{1, 64} {
		b.Run(fmt.Sprintf("senders=%d", senders), func(b *testing.B) {
			l, bl, tl := loopback(b), loopback(b), loopback(b)
			var arrived atomic.Int64
			serveOn(b, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				arrived.Add(1)
			})}, tl)
			target := &url.URL{Scheme: "http", Host: tl.Addr().String()}
			proxy := httputil.NewSingleHostReverseProxy(target)
			transport := &http.Transport{MaxIdleConnsPerHost: senders}
			proxy.Transport = transport
			b.Cleanup(transport.CloseIdleConnections)
			serveOn(b, &http.Server{Handler: proxy}, bl)
			newRig(b, l, quiet, "RESPONSE_MODE="+mode)
			client := newClientOf(b, "http://"+l.Addr().String()+"/subscribe/bench/", target.String())
			running(b, client.Run)
			eventually(b, "ready", func() bool { return client.Check(b.Context()) == nil })
			const n = 640
			side := func(l net.Listener) (loaded *load, cpu *time.Duration, run func()) {
				loaded, cpu = newLoad(b, l.Addr().String(), request, "", senders, 0), new(time.Duration)
				return loaded, cpu, func() {
					begin, want := cpuTime(), arrived.Load()+n
					loaded.run(n, 0)
					for arrived.Load() < want { // accept answers before
						time.Sleep(50 * time.Microsecond)
					}
					*cpu += cpuTime() - begin
				}
			}
			ours, oursCPU, runOurs := side(l)
			bare, bareCPU, runBare := side(bl)
			duel(b, "request", n, runOurs, runBare)
			report := func(prefix string, took []time.Duration, cpu time.Duration) {
				b.ReportMetric(float64(cpu.Microseconds())/float64(len(took)), prefix+"cpu-µs/request")
				slices.Sort(took)
				for _, p := range []int{50, 99} {
					b.ReportMetric(float64(took[len(took)*p/100].Nanoseconds())/1e3, fmt.Sprintf("%sp%d-µs", prefix, p))
				}
			}
			report("", ours.took, *oursCPU)
			report("bare-", bare.took, *bareCPU)
		})
	}
}
