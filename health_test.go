package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fine and broken are checks.
func fine(context.Context) error { return nil }

func broken(context.Context) error { return errors.New("bus is down") }

// TestHealthRoutes is the route table: a probe is 200 or 503 with the reason,
// and nothing but GET and HEAD asks.
func TestHealthRoutes(t *testing.T) {
	const text = "text/plain; charset=utf-8"
	tests := []struct {
		request     string
		live, ready Check
		status      int
		body, kind  string
	}{
		{"GET /live", fine, broken, 200, "ok\n", text},
		{"GET /live", broken, fine, 503, "bus is down\n", text},
		{"GET /ready", broken, fine, 200, "ok\n", text},
		{"GET /ready", fine, broken, 503, "bus is down\n", text},
		{"HEAD /live", fine, fine, 200, "", ""},
		{"HEAD /ready", fine, broken, 503, "", text},
		{"GET /health", fine, fine, 200, `{"live":"ok","ready":"ok","role":"server","status":"ok"}` + "\n", "application/json"},
		{"GET /health", fine, broken, 503, `{"live":"ok","ready":"bus is down","role":"server","status":"failing"}` + "\n", "application/json"},
		{"GET /health", broken, broken, 503, `{"live":"bus is down","ready":"bus is down","role":"server","status":"failing"}` + "\n", "application/json"},
		{"HEAD /health", fine, fine, 200, "", "application/json"},
		{"GET /metrics", broken, broken, 200, "", "text/plain; version=0.0.4; charset=utf-8"},
		{"GET /", fine, fine, 404, "404 page not found\n", text},
		{"GET /live/", fine, fine, 404, "404 page not found\n", text},
		{"GET /subscribe/ci", fine, fine, 404, "404 page not found\n", text},
		{"POST /ready", fine, fine, 405, "method not allowed\n", text},
		{"DELETE /nothing", fine, fine, 405, "method not allowed\n", text},
	}
	for _, tt := range tests {
		h := &Health{Info: map[string]string{"role": "server"}, Live: tt.live, Ready: tt.ready}
		server := httptest.NewServer(h)
		method, path, _ := strings.Cut(tt.request, " ")
		status, body, header := send(t, method, server.URL+path, "")
		server.Close()
		if status != tt.status || body != tt.body || tt.kind != "" && header.Get("Content-Type") != tt.kind {
			t.Errorf("%s: got %d %q %q", tt.request, status, body, header.Get("Content-Type"))
		}
		if allow := header.Get("Allow"); (allow == "GET, HEAD") != (status == 405) {
			t.Errorf("%s: Allow is %q", tt.request, allow)
		}
	}
}

// TestHealthCheckTimeout checks that a check which hangs is given up long before
// the one who probes gives up.
func TestHealthCheckTimeout(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return errors.New("hangs")
	}
	for _, path := range []string{"/live", "/ready", "/health"} {
		synctest.Test(t, func(t *testing.T) {
			h := &Health{Live: hang, Ready: hang}
			w := httptest.NewRecorder()
			begin := time.Now()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
			if took := time.Since(begin); took != checkTimeout || w.Code != 503 || !strings.Contains(w.Body.String(), "hangs") {
				t.Errorf("%s: %d %q after %s", path, w.Code, w.Body, took)
			}
		})
	}
}

// TestExposition holds the metrics format to the letter.
func TestExposition(t *testing.T) {
	var n atomic.Int64
	n.Store(7)
	h := &Health{Metrics: []Metric{
		counter("relay_a_total", "Things.", &n),
		{`relay_b{kind="x"}`, "gauge", "Kinds.", func() int64 { return -1 }},
		{`relay_b{kind="y"}`, "gauge", "Kinds.", func() int64 { return 1 << 40 }},
		gauge("relay_c", "Last.", func() int64 { return 0 }),
	}}
	const want = `# HELP relay_a_total Things.
# TYPE relay_a_total counter
relay_a_total 7
# HELP relay_b Kinds.
# TYPE relay_b gauge
relay_b{kind="x"} -1
relay_b{kind="y"} 1099511627776
# HELP relay_c Last.
# TYPE relay_c gauge
relay_c 0
`
	if got := h.exposition(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestMetrics reads what both roles expose as a scraper does: every family
// stands together under its own help and type, once, and counters say so by
// their name.
func TestMetrics(t *testing.T) {
	hub := &Hub{Budget: &Budget{}}
	server, err := NewServer(ServerOptions{}, hub, hub, nil)
	if err != nil {
		t.Fatal(err)
	}
	for role, metrics := range map[string][]Metric{
		"server":            serverMetrics(server, hub, nil, &door{}),
		"server with Redis": serverMetrics(server, hub, &RedisBus{}, &door{}),
		"client":            clientMetrics(&Client{}),
	} {
		t.Run(role, func(t *testing.T) {
			kinds := map[string]string{}
			family := ""
			for line := range strings.Lines((&Health{Metrics: metrics}).exposition()) {
				fields := strings.Fields(line)
				switch {
				case strings.HasPrefix(line, "# HELP "):
					family = fields[2]
					if kinds[family] != "" || len(fields) < 4 || !strings.HasSuffix(line, ".\n") || !strings.HasPrefix(family, "relay_") {
						t.Errorf("help %q", line)
					}
				case strings.HasPrefix(line, "# TYPE "):
					kinds[family] = fields[3]
					if fields[2] != family || (fields[3] == "counter") != strings.HasSuffix(family, "_total") {
						t.Errorf("type %q under %s", line, family)
					}
				default:
					if name, _, _ := strings.Cut(fields[0], "{"); name != family || fields[1] != "0" {
						t.Errorf("sample %q under %s", line, family)
					}
				}
			}
			families := map[string]bool{}
			for _, m := range metrics {
				name, _, _ := strings.Cut(m.Name, "{")
				families[name] = true
			}
			if len(kinds) != len(families) {
				t.Errorf("%d families, want %d", len(kinds), len(families))
			}
		})
	}
}

// TestMetricsOfHeld: a held webhook is counted once it has ended, with an answer
// or without, and every heartbeat of every stream is.
func TestMetricsOfHeld(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		p := newPipes()
		rt := p.transport(t, false)
		r := newRig(t, p, "RESPONSE_MODE=status", "SERVER_HEARTBEAT_INTERVAL=2s")
		check := func(when string, answered, unanswered, heartbeats int) {
			t.Helper()
			synctest.Wait()
			text := (&Health{Metrics: serverMetrics(r.Server, r.hub, nil, &door{})}).exposition()
			for _, sample := range []string{
				fmt.Sprintf("\nrelay_webhooks_answered_total %d\n", answered),
				fmt.Sprintf("\nrelay_webhooks_unanswered_total %d\n", unanswered),
				fmt.Sprintf("\nrelay_heartbeats_total %d\n", heartbeats),
			} {
				if !strings.Contains(text, sample) {
					t.Errorf("%s: no %q in\n%s", when, sample, text)
				}
			}
		}
		listeners := []*listener{listen(t, rt, streamURL, features...), listen(t, rt, streamURL, features...)}
		told := make(chan outcome)
		hold := func(ctx context.Context) { go func() { told <- post(ctx, rt, "POST", hooksURL, "x") }() }
		time.Sleep(5 * time.Second)
		check("at the start", 0, 0, 4)

		for n := 1; n <= 2; n++ {
			hold(t.Context())
			id := listeners[0].next(t, n).webhook(t).ID
			check("held", n-1, 0, 4)
			listeners[0].report(t, rt, id, Answer{Status: 200})
			if got := <-told; got.status != 200 {
				t.Errorf("answer %+v, want 200", got)
			}
			check("answered", n, 0, 4)
		}

		for _, l := range listeners {
			l.close()
			<-l.done
		}
		synctest.Wait()
		hold(t.Context())
		if got := <-told; got.status != 503 {
			t.Errorf("answer %+v, want 503", got)
		}
		check("nobody came", 2, 1, 4)
		ctx, hangUp := context.WithCancel(t.Context())
		hold(ctx)
		time.Sleep(time.Second)
		hangUp()
		<-told
		check("the sender hung up", 2, 2, 4)
	})
}

// TestHealthOfServer asks the program itself: what it counts, and what becomes
// of its probes while it ends.
func TestHealthOfServer(t *testing.T) {
	t.Parallel()
	server := startServer(t, "HEALTH_SERVICE_PORT=0", "HEALTH_SERVICE_SHUTDOWN_DELAY=2000")
	get := func(path string) (int, string) {
		status, body, _ := send(t, "GET", "http://"+server.health+path, "")
		return status, body
	}
	send(t, "POST", "http://"+server.addr+"/webhooks/canary", "{}")
	send(t, "POST", "http://"+server.addr+"/webhooks/can@ary", "{}")
	_, metrics := get("/metrics")
	for _, sample := range []string{"relay_webhooks_total 2\n", "relay_webhooks_refused_total{reason=\"channel\"} 1\n", "relay_held_webhooks 1\n"} {
		if !strings.Contains(metrics, sample) {
			t.Errorf("no %q in\n%s", sample, metrics)
		}
	}
	if strings.Contains(metrics, "canary") {
		t.Error("a channel that nobody subscribed to is in the metrics")
	}
	_, summary := get("/health")
	var doc map[string]string
	if err := json.NewDecoder(strings.NewReader(summary)).Decode(&doc); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if keys := slices.Sorted(maps.Keys(doc)); !slices.Equal(keys, []string{"live", "ready", "role", "status", "version"}) || doc["role"] != "server" || doc["status"] != "ok" {
		t.Errorf("summary %s", summary)
	}
	server.cancel()
	server.wait("shutting down")
	eventually(t, "unready", func() bool { status, _ := get("/ready"); return status == 503 })
	if status, body := get("/live"); status != 200 {
		t.Errorf("live is %d %q while shutting down", status, body)
	}
	if status, _, _ := send(t, "POST", "http://"+server.addr+"/webhooks/ci", "{}"); status != 200 {
		t.Errorf("webhook got %d before the shutdown delay was over", status)
	}
	if err := server.stop(); err != nil {
		t.Error(err)
	}
}

// TestProbesComeThrough: connections to the health port that are only there do
// not keep a probe out, and none stays after its answer.
func TestProbesComeThrough(t *testing.T) {
	server := startServer(t, probed...)
	var conns []net.Conn
	for range probeConnections + 50 {
		conns = append(conns, connect(t, server.health))
	}
	half := connect(t, server.health)
	io.WriteString(half, "GET /live HTTP/1.1\r\nHost: x\r\n") // a header without an end
	for range 20 {
		for _, page := range []string{"/live", "/ready", "/health", "/metrics"} {
			conn := connect(t, server.health)
			io.WriteString(conn, "GET "+page+" HTTP/1.1\r\nHost: x\r\n\r\n")
			answer, err := io.ReadAll(conn) // comes to its end
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 OK\r\n") || !strings.Contains(string(answer), "\r\nConnection: close\r\n") {
				t.Fatalf("%s: %.200q, %v", page, answer, err)
			}
		}
	}
	idle := 0
	for _, conn := range conns {
		conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			idle++
		}
	}
	if idle > probeConnections/2 {
		t.Errorf("%d idle connections of one address are open, there is space for %d in all", idle, probeConnections)
	}
	half.SetReadDeadline(time.Now().Add(patience))
	begin := time.Now()
	if _, err := io.ReadAll(half); errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > probeTime+5*time.Second {
		t.Errorf("a header without an end is waited for: %v after %s", err, time.Since(begin))
	}
}
