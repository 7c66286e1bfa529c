// Webhook Relay brings webhooks into clusters that the internet cannot reach.
//
// RELAY_MODE picks the role. A server runs where providers reach it and takes
// webhooks; a client runs inside, holds one outbound stream to the server, and
// forwards each webhook to its target exactly as it was sent. A demo runs both, and
// a target, on loopback.
//
// # Endpoints of the server
//
//	ANY  /webhooks/{channel}[/…]            a provider's webhook
//	GET  /subscribe/{channel}[/]            the event stream
//	POST /subscribe/{channel}/responses     a client reports on one or more events
//	GET  /                                  as /ready of the health service
//
// And of the health service of both roles, on a port of its own:
//
//	GET  /live, /ready                      200, or 503 with the reason
//	GET  /health                            all checks: since when, and the last error
//	GET  /metrics                           for Prometheus
//	GET  /                                  the status page, which reads /events
//	GET  /status                            the same as JSON
//
// Errors of the relay itself are JSON, {"statusCode":413,"message":"…"}. A
// passing state is 503, 504 or 502, never a status on which providers disable
// a hook. One reading of the request target decides everything: what is
// forwarded is exactly /webhooks/{channel} or below it, at the server and again
// at the client.
//
// # Event stream
//
// Server-sent events (HTML standard, section 9.2). Each stream begins with one
// ready, sent once the subscription is live on every replica; heartbeat comes
// every interval; drain says that the server will end this stream soon, after
// all that is queued for it: a client opens its next stream at once and reads
// this one to its end. A webhook is an HTTP message (RFC 9112) with LF for line
// ends:
//
//	id: XCVB3M7JQ2N5K-2PLJ…
//	event: webhook
//	data: POST /webhooks/ci/push?x=1 HTTP/1.1
//	data: Host: relay.example.com
//	data: Content-Type: application/json
//	data: Content-Length: 17
//	data: X-Relay-Time: 1700000000000
//	data: X-Relay-Respond: status; timeout=9000
//	data:
//	data: {"hello":"world"}
//
// A body that is not UTF-8, has a CR, or has lines so short that their prefixes
// cost more than base64 does, is one line of base64, marked X-Relay-Body: base64;
// Content-Length counts what is in the message. Bytes above 0x7F before the body
// stand for the code points of the same numbers. X-Relay-Time is when the webhook
// came, in milliseconds; X-Relay-Respond is the response mode, and for how long
// the sender waits, in milliseconds; X-Relay-Scheme: https is there when the sender
// used it on the connection to the server.
//
// That is for readers that send X-Relay-Features: http. All others get the legacy
// form, an unnamed event with one line of JSON:
//
//	data: {"headers":{"content-type":"…","content-length":"2"},"originalUrl":"/webhooks/ci/push?x=1",
//	       "path":"/webhooks/ci/push","query":{"x":"1"},"body":"{}","timestamp":1700000000000}
//
// bodyBase64 stands for body when that is not UTF-8. A client that sends
// X-Relay-Features: respond and its name in X-Relay-Client reports; drain there
// asks for that event.
//
// A report is an HTTP message too: HTTP/1.1 responses one after the other, each
// with X-Relay-Event-Id and its own length. In accept 202 says that the client has
// the event; otherwise it is the target's answer, or 502 or 504 with X-Relay-Error:
// unreachable or timeout when there was none. 202 with X-Relay-Error: taken says
// that the client's streams end, and that it will still report.
//
// # The life of a webhook
//
// Every webhook is held, by the replica that took it (its holder), until a client
// has reported on it. The modes differ in when the provider is answered and when
// the client reports:
//
//	accept    200 once the bus took the event       202 when the client begins to forward it
//	status    the target's status                   when the target has answered
//	response  the target's status, header and body  when the target has answered
//
// Replicas tell each other, in any order:
//
//	event    holder, to all with subscribers   the webhook, its round, whom it is for, its time left
//	receipt  each of those, to the holder      event, round, the subscribers that were given it, with
//	                                           the names of their clients
//	report   the replica a client reports to,  event, channel, client, the report
//	         to the holder, or to all when it
//	         is gone
//	ready    the replica of a stream, to all   channel, client: half of its queue is free again; with
//	                                           a subscriber: it is ready, which ends its client's
//	                                           streams that were not asked to move
//	left     the replica of a stream, to all   subscriber: its stream has ended
//	again    a replica the bus was away for,   what it was told, or told, may be lost
//	         to all
//	hand     a leaving holder, to one other    an event of accept, to hold from now on
//	gone     the bus, to its own replica       a replica that is no more
//	joined   a replica, to all                 for the bus itself
//
// A hold knows who was given the event and who has settled; both only grow. A
// client settles, by its name, with its report; its stream's end settles the
// stream; a reader that cannot report is settled by the receipt. A subscriber
// whose queue is full is not given it. Then, once every receipt has come:
//
//   - open: a client has it on a live stream. Wait.
//   - done, in accept: a client has reported, and none broke less than ten seconds
//     ago without; or only readers that cannot report were given it. In status and
//     response: the first 2xx; otherwise, when nobody is left who could still say
//     2xx, the best of the failures.
//   - a client whose streams broke and that is back within ten seconds is given
//     again what it has not reported, although others have it.
//   - otherwise nobody has it: it waits, and is published again to whoever becomes
//     ready, the oldest first and no further than the first that finds no space.
//     New webhooks of the channel wait behind it.
//
// Time is over: in status and response after RESPONSE_TIMEOUT, with the best
// failure, else 504 when a client was given it, else 503. In accept when no client
// was there for SERVER_HOLD_TIME: the event is lost, counted and logged. Nothing
// else loses it but a crash of its holder, or of the client that reported it. A
// channel that nobody subscribed to within that time holds nothing in accept.
//
// # Guarantees
//
// A webhook accepted after a stream's ready is delivered to that stream. Method,
// request target, end-to-end headers and body reach the target byte for byte.
// Delivery is at least once; X-Relay-Event-Id is the same on every try, and a
// client forwards it once. Payloads are never stored.
//
// # Bounds
//
// No address, which is a /64 in IPv6, and no channel may take everything: half
// is rounded up. Connections of TRUSTED_PROXIES have no share, as they come for
// many.
//
//	what                                 bound                              at the bound
//	webhook body                         SERVER_MAX_PAYLOAD_SIZE_LIMIT 3mb  413
//	event on the stream                  64 MiB                             413
//	request header                       16 KiB and 4 of net/http, 10 s     431, or 400; connection closed
//	values in a webhook's header         500                                431
//	request body                         60 s                               400, connection closed
//	rest of a refused body               16 MiB, 5 s                        connection closed
//	webhooks held, being read or queued, SERVER_HELD_BUFFER 256mb           503; not given to a subscriber
//	answers, 16 KiB for each request
//	and 1 KiB for each hold
//	the same, of one channel             half of it                         the same
//	bodies being read                    half of it                         the one that stalled longest, for
//	                                                                        1 s, gets 503; else the new one
//	the same, of channels that may yet   a 32nd of it                       200, and gone: counted and logged
//	get a first subscriber, in the first
//	SERVER_HOLD_TIME after the start
//	a held request                       RESPONSE_TIMEOUT 9s, at most 15m   504; 503 when nobody took it
//	a hold of accept without a client    SERVER_HOLD_TIME 60s               lost: counted and logged
//	receipts                             1 s                                not waited for
//	a client whose streams broke         10 s                               not waited for
//	subscribers remembered as gone       16384                              the oldest forgotten
//	leaving replicas that hand an event  5                                  lost: counted and logged
//	to each other
//	the bus taking a webhook             2 s, and 2.5 s once it is written  503
//	answer to a provider                 70 s after its header; held:       connection closed
//	                                     10 s after RESPONSE_TIMEOUT
//	idle connection                      2 min                              closed
//	connections                          SERVER_MAX_SUBSCRIBERS + 4096,     the longest idle one closed;
//	                                     256 to the health service          where none is idle, the new one
//	connections of one address           half of these                      the same, among its own
//	connection to the health service     one request, 5 s for its header,   closed
//	                                     10 s for its answer
//	check for GET /                      2 s                                503
//	webhooks on the status page          200                                the oldest is gone
//	status pages that are open           16, 5 s to take what is sent       503; closed
//	path of a webhook in the log and     256 bytes                          cut
//	on the page
//	requests on an HTTP/2 connection     50                                 wait at the sender
//	subscribers                          SERVER_MAX_SUBSCRIBERS 10000       503
//	subscribers of one address           SERVER_MAX_SUBSCRIBERS_PER_ADDRESS
//	                                     5000                               503
//	subscribers of one channel           half of SERVER_MAX_SUBSCRIBERS     503
//	becoming ready                       5 s, 1 s while the bus is away     503
//	undelivered events of a subscriber   SERVER_SUBSCRIBER_BUFFER 16mb      not given to it; they wait
//	a write to a stream that takes       60 to 90 s                         evicted; it reconnects
//	nothing
//	body of a request for a stream       none                               400
//	what a subscriber sends on           4 KiB                              stream closed
//	reports of one request               4 MiB, 10 s                        400
//	one of them                          64 KiB and 500 values of header,   400
//	                                     1 MiB of body
//	reports being read                   64 MiB                             503; sent again
//	files of tokens, of secrets, of      1 MiB each                         refused; the last good one stays
//	issuers, and of pairs
//	the same, but pairs, with half a     two equal looks, 3 s apart, or     not in force before; the server
//	last line                            1 s for 10 s at the start          does not start
//	time of a signature that tells it    5 min to either side               401
//	messages to Redis                    512 unanswered; one at a time      wait
//	                                     above 256 KiB
//	signals between replicas             16384 wait                         dropped; all is published again
//	silence of Redis                     2.5 s and a last look of 0.1 s     connected anew
//	lines of one message in the log      50 a second, above debug           left out; the next tells how many
//	lines of the log that nobody takes   1024, 1 s for them at the end      the same
//	line or event at the client          64 MiB                             stream cut; it reconnects
//	header of a webhook at the client    64 KiB and 508 values              refused, counted
//	silence on a stream                  two heartbeats and 1 s, 20 s       stream cut; it reconnects
//	                                     before ready, a last look of
//	                                     0.25 s
//	a stream that was asked to move      1 min after the next is ready      cut
//	clocks of replicas that a stream     64                                 all forgotten
//	compares
//	connecting to source and target      10 s, and 10 s for TLS             tried again
//	forwards at once                     TARGET_CONCURRENCY 32              the client stops reading
//	forwards that wait to be tried       64 MiB, 4 KiB for each             they keep their place
//	again or reported
//	one attempt at the target            TARGET_TIMEOUT 30s                 tried again
//	attempts at the target               TARGET_RETRY_WINDOW 60s            given up, logged
//	answer of a target                   64 KiB header, 1 MiB body          unreachable; body left out
//	body of a target that nobody wants   64 KiB, 500 ms                     connection closed
//	redirects of a target                5                                  unreachable
//	requests with reports                4 at once, 5 s each                what waits goes into the next
//	reports that nobody waits for        16384, 1 min                       the oldest dropped
//	events remembered by a client        16384, 16 MiB, 15 min              the oldest forgotten
package main

import (
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	stdlog "log"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"
)

const (
	extraConnections = 4096                 // beyond those of subscribers
	probeConnections = 256                  // to the health service
	probeTime        = 5 * time.Second      // for a probe's header, and for its answer
	hushLines        = 50                   // of one message a second, above debug
	maxDuration      = 365 * 24 * time.Hour // that can be set
	demoHook         = "/webhooks/demo/hello"
	demoStart        = 10 * time.Second // for the client to become ready
	demoShown        = 4 << 10          // bytes of one webhook
)

// release is set by -ldflags "-X main.release=…".
var release string

// version names the build: the release, or what the toolchain recorded.
var version = func() string {
	if release != "" {
		return release
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return strings.Trim(info.Main.Version, "()")
	}
	return "devel"
}()

func main() {
	flags := flag.NewFlagSet("webhook-relay", flag.ContinueOnError)
	flags.Usage = func() { printHelp(os.Stdout) }
	showVersion := flags.Bool("version", false, "")
	var asked string
	flags.Func("probe", "", into(&asked, oneOf("live", "ready", "health")))
	if err := flags.Parse(os.Args[1:]); err != nil {
		if err == flag.ErrHelp {
			return
		}
		os.Exit(2)
	}
	if *showVersion {
		fmt.Println("webhook-relay", version)
		return
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "webhook-relay: unexpected argument %q: everything is set by environment variables, see -help\n", flags.Arg(0))
		os.Exit(2)
	}
	if asked != "" {
		if err := askOwnHealth(asked); err != nil {
			fmt.Fprintf(os.Stderr, "webhook-relay: probe /%s: %v\n", asked, err)
			os.Exit(1)
		}
		return
	}
	stdlog.SetOutput(io.Discard)   // net/http would quote what a target sends unasked
	signal.Ignore(syscall.SIGPIPE) // who reads the log may go
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	second := make(chan os.Signal, 1)
	context.AfterFunc(ctx, func() { // the second signal does not wait for anything
		signal.Notify(second, syscall.SIGTERM, os.Interrupt)
		stop()
		<-second
		os.Exit(1)
	})
	if err := run(ctx, os.Environ(), os.Stderr); err != nil {
		if _, ok := errors.AsType[configError](err); ok {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// run is the whole program: it reads its configuration from environ, logs to
// stderr, and returns once ctx has ended and everything is finished. Its error has
// been logged; a configError means that it did not start.
func run(ctx context.Context, environ []string, stderr io.Writer) (err error) {
	c, warnings, err := loadConfig(environ)
	if c.LogFormat == "" && isTerminal(stderr) {
		c.LogFormat = "text"
	}
	out := newLogQueue(stderr)
	defer out.close()
	log := newLogger(c, out)
	if mistakes, ok := errors.AsType[configError](err); ok {
		for mistake := range strings.Lines(mistakes.text) {
			log.Error("mistake in the configuration", "err", strings.TrimSuffix(mistake, "\n"))
		}
		log.Error("not started: the configuration has mistakes", "hint", "webhook-relay -help tells of every variable")
		return err
	}
	defer func() {
		if err != nil {
			log.Error("failed", "err", err)
		}
	}()
	log.Info("starting", "role", c.Role, "version", version, "settings", c.shown)
	for _, w := range warnings {
		log.Warn(w.message, w.attrs...)
	}
	if c.Role == "server" {
		if c.Server.Token == "" && c.Server.TokensFile == "" && c.Server.ClientCAFile == "" {
			log.Warn("anybody may subscribe: neither AUTH_TOKEN nor AUTH_TOKENS_FILE is set")
		}
		return runServer(ctx, c, log)
	}
	if c.Role == "demo" {
		return runDemo(ctx, environ, c, log, stderr)
	}
	return runClient(ctx, c, log)
}

// runServer serves until ctx ends, then drains.
func runServer(ctx context.Context, c *Config, log *slog.Logger) error {
	hub := &Hub{Limits: c.Limits, Budget: &Budget{Limit: c.HeldBuffer}}
	opts := c.Server
	opts.Replica = newReplica()
	var bus Bus = hub
	var redisBus *RedisBus
	if c.Redis.Server.Addr != "" || c.Redis.Server.Master != "" {
		redisBus = NewRedisBus(c.Redis, opts.Replica, hub, log)
		bus = redisBus
	}
	server, err := NewServer(opts, hub, bus, log)
	if err != nil {
		return configError{err.Error()}
	}
	hub.OnSignal = server.signal
	if redisBus != nil {
		hub.Watch, redisBus.OnCutOff = redisBus.watch, server.AskToMove
	}
	journal := &Journal[Passage]{}
	health := &Health{
		Info:    map[string]string{"role": c.Role, "version": version},
		Checks:  []Check{{"hub", "live", hub.Check}, {"holds", "live", server.Alive}, {"server", "ready", server.Check}},
		State:   func() any { return server.State() },
		Journal: journal,
	}
	if redisBus != nil {
		health.Checks = append(health.Checks, Check{"redis", "ready", redisBus.Check})
	}
	if c.Health {
		server.Note = noteIn(journal)
	}
	web := webServer(server, log)
	listener, err := c.listen(c.Port)
	if err != nil {
		return fmt.Errorf("listen for webhooks (SERVER_PORT): %w", err)
	}
	limited := limit(listener, c.Limits.Subscribers+extraConnections, c.Server.TrustedProxies)
	web.ConnState = limited.state
	serve := func() error { return web.Serve(limited) }
	if c.CertFile != "" {
		if web.TLSConfig, err = c.serverTLS(log); err != nil {
			listener.Close()
			return err
		}
		serve = func() error { return web.ServeTLS(limited, "", "") }
	}
	health.Metrics = serverMetrics(server, hub, redisBus, limited)
	stopProbes, err := serveHealth(c, health, log)
	if err != nil {
		listener.Close()
		return err
	}

	running, fail := context.WithCancelCause(context.Background()) // ends with the first failure, or at the end
	var parts sync.WaitGroup
	for _, part := range []func() error{
		serve,
		func() error { return bus.Run(running) },
		func() error { return server.Run(running) },
	} {
		parts.Go(func() {
			if err := part(); err != nil && err != http.ErrServerClosed {
				fail(err)
			}
		})
	}
	log.Info("listening", "addr", listener.Addr().String(), "tls", c.CertFile != "")

	select {
	case <-running.Done(): // something failed beyond repair
	case <-ctx.Done():
		log.Info("shutting down", "reason", context.Cause(ctx))
		server.Drain()
		if c.Health {
			select { // load balancers need time to see /ready
			case <-time.After(c.ShutdownDelay):
			case <-running.Done():
			}
		}
	}
	drain(c, server, web, bus)
	stopProbes()
	fail(nil)
	parts.Wait()
	log.Info("stopped")
	if err := context.Cause(running); err != context.Canceled {
		return err
	}
	return nil
}

// drain ends what is under way within the handler timeout: streams and holds, then
// answers that are being written, then what the bus has yet to send.
func drain(c *Config, server *Server, web *http.Server, bus Bus) {
	end := time.Now().Add(c.HandlerTimeout)
	server.Shutdown()
	finish, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	if web.Shutdown(finish) != nil {
		web.Close()
	}
	bus.Flush(finish)
}

// runClient forwards until ctx ends: one Client for each channel, so that a dead
// target does not stop the others.
func runClient(ctx context.Context, c *Config, log *slog.Logger) error {
	cert := keyPair(sourcePair, c.SourceCertFile, c.SourceKeyFile)
	if err := cert.open(); err != nil {
		return err
	}
	var clients []*Client
	for _, source := range c.Sources {
		opts := c.clientOf(source)
		if c.SourceCertFile != "" {
			opts.Certificate = func() (*tls.Certificate, error) { return cert.fresh(log), nil }
		}
		clients = append(clients, NewClient(opts, log))
	}
	journal := &Journal[Passage]{}
	health := &Health{
		Info:    map[string]string{"role": c.Role, "version": version},
		Metrics: clientMetrics(clients),
		State: func() any {
			var state struct {
				Streams []StreamState `json:"streams"`
			}
			for _, client := range clients {
				state.Streams = append(state.Streams, client.State())
			}
			return state
		},
		Journal: journal,
	}
	for _, client := range clients {
		alive := func(probe context.Context) error {
			if ctx.Err() != nil {
				return nil // forwards are finishing
			}
			return client.Alive(probe)
		}
		health.Checks = append(health.Checks, Check{"client " + client.channel, "live", alive}, Check{"stream " + client.channel, "ready", client.Check})
		if c.Health {
			client.Note = noteIn(journal)
		}
	}
	stopProbes, err := serveHealth(c, health, log)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { log.Info("shutting down", "reason", context.Cause(ctx)) })
	var running sync.WaitGroup
	for _, client := range clients {
		running.Go(func() { client.Run(ctx) })
	}
	running.Wait()
	stopProbes()
	log.Info("stopped")
	return nil
}

// noteIn keeps what servers and clients tell of webhooks in j.
func noteIn(j *Journal[Passage]) func(entry uint64, p Passage) uint64 {
	return func(entry uint64, p Passage) uint64 {
		if p.Outcome != outcomeHeld && p.Outcome != outcomeForwarding {
			failed := p.Outcome != outcomeAccepted && p.Outcome != outcomeAnswered && p.Outcome != outcomeForwarded
			j.Count(p.took(), failed || p.Status >= 500)
		}
		return j.Put(entry, p)
	}
}

// Demo.

// runDemo shows one webhook's way: through a server and a client, which environ
// sets like any others, to a target, all in this process and on loopback alone.
// It writes to out, from several goroutines, what the target gets, until ctx ends.
func runDemo(ctx context.Context, environ []string, c *Config, log *slog.Logger, out io.Writer) error {
	environ = slices.DeleteFunc(slices.Clone(environ), func(entry string) bool { // blank means unset
		_, value, _ := strings.Cut(entry, "=")
		return strings.TrimSpace(value) == ""
	})
	isSet := func(name string) bool {
		return slices.ContainsFunc(environ, func(entry string) bool { return strings.HasPrefix(entry, name+"=") })
	}
	var ports []int // of the server, its health service, the client's, and the target
	listeners := map[int]net.Listener{}
	for _, wanted := range []struct {
		variable string
		port     int
	}{{"SERVER_PORT", c.Port}, {"HEALTH_SERVICE_PORT", c.HealthPort}, {"", 0}, {"", 0}} {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", wanted.port))
		if err != nil && !isSet(wanted.variable) { // the default is taken
			l, err = net.Listen("tcp", "127.0.0.1:0")
		}
		if err != nil {
			return fmt.Errorf("%w (%s)", err, wanted.variable)
		}
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).Port
		ports, listeners[port] = append(ports, port), l
	}
	usual := []string{"RESPONSE_MODE=response", "HEALTH_SERVICE_SHUTDOWN_DELAY=0"}
	fixed := []string{ // so that it meets nothing but itself
		fmt.Sprintf("SOURCE_URL=http://127.0.0.1:%d/subscribe/demo/", ports[0]),
		fmt.Sprintf("TARGET_BASE_URL=http://127.0.0.1:%d", ports[3]),
		"AUTH_TOKENS_FILE=", "WEBHOOK_SECRETS_FILE=", "REDIS_URL=", "SERVER_TLS_CERT_FILE=", "SERVER_TLS_KEY_FILE=", "SERVER_TLS_CLIENT_CA_FILE=",
		"SOURCE_TLS_CERT_FILE=", "SOURCE_TLS_KEY_FILE=", "SUBSCRIBE_ALLOWED_IPS=", "WEBHOOKS_ALLOWED_IPS=", // who may come is on loopback
	}
	for _, entry := range fixed {
		if name, _, _ := strings.Cut(entry, "="); isSet(name) {
			log.Warn("variable has no effect", "variable", name)
		}
	}
	running, fail := context.WithCancelCause(ctx) // ends with the first failure, too
	defer fail(nil)
	parts := []func() error{func() error { return greet(running, out, ports) }}
	for i, role := range []string{"server", "client"} {
		c, _, err := loadConfig(slices.Concat(usual, environ, fixed, []string{"RELAY_MODE=" + role,
			fmt.Sprintf("SERVER_PORT=%d", ports[0]), fmt.Sprintf("HEALTH_SERVICE_PORT=%d", ports[1+i])}))
		if err != nil {
			return err
		}
		c.listeners = listeners
		start := []func(context.Context, *Config, *slog.Logger) error{runServer, runClient}[i]
		parts = append(parts, func() error { return start(running, c, log.With("role", role)) })
	}
	web := &http.Server{Handler: demoTarget(out), ReadTimeout: bodyTimeout, ErrorLog: stdlog.New(httpLog{log}, "", 0)}
	var serving, working sync.WaitGroup
	serving.Go(func() { web.Serve(listeners[ports[3]]) })
	for _, part := range parts {
		working.Go(func() {
			if err := part(); err != nil {
				fail(err)
			}
		})
	}
	working.Wait()
	web.Close() // after the client, which finishes its forwards
	serving.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(running)
}

// greet sends the demo's webhook once its client is ready, and says what to try next.
func greet(ctx context.Context, out io.Writer, ports []int) error {
	ready, cancel := context.WithTimeout(ctx, demoStart)
	defer cancel()
	for {
		err := askHealth(ctx, ports[2], "ready")
		if err == nil {
			break
		}
		if time.Sleep(5 * time.Millisecond); ready.Err() != nil {
			return fmt.Errorf("client is not ready: %w", err)
		}
	}
	fmt.Fprint(out, "A server, a client and a target run in this process, on loopback alone. One webhook's way:\n")
	began := time.Now()
	resp, err := onLoopback(ctx, http.MethodPost, ports[0], demoHook, `{"hello":"world"}`)
	if err != nil {
		return fmt.Errorf("send a webhook: %w", err)
	}
	resp.Body.Close()
	_, err = fmt.Fprintf(out, "\nPOST %s: %d after %.0f ms\n\n"+
		"send another  curl -i -d '{\"hello\":\"again\"}' http://127.0.0.1:%d%s\n"+
		"status page   http://127.0.0.1:%d/\n"+
		"to end        Ctrl-C\n", demoHook, resp.StatusCode, math.Ceil(time.Since(began).Seconds()*1000), ports[0], demoHook, ports[1])
	return err
}

var (
	unprintable = regexp.MustCompile(`[^\n\t \pL\pM\pN\pP\pS]|\x{FFFD}`) // which a broken byte is, too
	lineStart   = regexp.MustCompile(`(?m)^.`)
)

// demoTarget writes each request to out, cut and with everything escaped that a
// terminal would act on: strangers on this machine may send one.
func demoTarget(out io.Writer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var b strings.Builder
		fmt.Fprintf(&b, "%s %s %s\nHost: %s\n", r.Method, r.RequestURI, r.Proto, r.Host)
		r.Header.Write(&b)
		b.WriteByte('\n')
		n, _ := io.Copy(&b, io.LimitReader(r.Body, demoShown))
		more, _ := io.Copy(io.Discard, r.Body)
		text := strings.TrimRight(strings.ReplaceAll(b.String(), "\r\n", "\n"), "\n")
		if more > 0 || len(text) > demoShown {
			text = fmt.Sprintf("%s\n[cut: the body has %d bytes]", text[:min(len(text), demoShown)], n+more)
		}
		text = unprintable.ReplaceAllStringFunc(text, func(s string) string {
			return strings.Trim(strconv.Quote(s), `"`)
		})
		fmt.Fprintf(out, "\nthe target received\n\n%s\n", lineStart.ReplaceAllString(text, "  $0"))
		io.WriteString(w, "hello from the target\n")
	})
}

// askOwnHealth asks the health service that the environment sets.
func askOwnHealth(path string) error {
	c, _, err := loadConfig([]string{"RELAY_MODE=demo", "HEALTH_SERVICE_PORT=" + os.Getenv("HEALTH_SERVICE_PORT")}) // a demo requires nothing
	if err != nil {
		return err
	}
	return askHealth(context.Background(), c.HealthPort, path)
}

// askHealth asks a health service on this machine; its error is why the answer is not 200.
func askHealth(ctx context.Context, port int, path string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	resp, err := onLoopback(ctx, http.MethodGet, port, "/"+path, "")
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w (outside Kubernetes the health service runs when HEALTH_SERVICE_PORT is set)", err)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		reason, _ := io.ReadAll(io.LimitReader(resp.Body, demoShown))
		return fmt.Errorf("%s: %q", resp.Status, bytes.TrimSpace(reason))
	}
	return nil
}

// onLoopback is one request to this machine, on a connection of its own and never
// through a proxy.
func onLoopback(ctx context.Context, method string, port int, path, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "webhook-relay/"+version)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return (&http.Transport{DisableKeepAlives: true, DisableCompression: true}).RoundTrip(req)
}

// webServer is the http.Server for providers and subscribers.
func webServer(handler http.Handler, log *slog.Logger) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // an ingress may speak h2c
	return &http.Server{
		Handler:   handler,
		Protocols: &protocols,

		DisableGeneralOptionsHandler: true, // "OPTIONS *" is not found either

		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       bodyTimeout,                // net/http lifts it once the body is read
		WriteTimeout:      bodyTimeout + replyTimeout, // held requests and streams set their own
		IdleTimeout:       idleTimeout,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: streamsAtOnce,
			WriteByteTimeout:     writeTimeout / 2, // net/http waits twice when a write made some progress
		},
		MaxHeaderBytes: headerLimit,
		ErrorLog:       stdlog.New(httpLog{log}, "", 0),
	}
}

// httpLog takes what net/http has to say: the doings of strangers, a bug of ours,
// or that no connection can be accepted, as when file descriptors run out.
type httpLog struct{ *slog.Logger }

func (l httpLog) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(p, []byte("panic")) || bytes.HasPrefix(p, []byte("http: Accept error")) {
		level = slog.LevelError
	}
	l.Log(context.Background(), level, "net/http", "err", strings.TrimSpace(string(p)))
	return len(p), nil
}

// serveHealth answers probes until stop, which waits for its goroutine, when
// the health service is wanted.
func serveHealth(c *Config, health *Health, log *slog.Logger) (stop func(), err error) {
	if !c.Health {
		return func() {}, nil
	}
	listener, err := c.listen(c.HealthPort)
	if err != nil {
		return nil, fmt.Errorf("listen for probes (HEALTH_SERVICE_PORT): %w", err)
	}
	log.Info("health service listening", "addr", listener.Addr().String())
	web := &http.Server{
		Handler:           health,
		ReadHeaderTimeout: probeTime,
		WriteTimeout:      2 * probeTime,
		MaxHeaderBytes:    headerLimit,
		ErrorLog:          stdlog.New(httpLog{log}, "", 0),
	}
	web.SetKeepAlivesEnabled(false) // a connection that is only there keeps a probe out
	limited := limit(listener, probeConnections, nil)
	web.ConnState = limited.state
	looking, enough := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { web.Serve(limited) })
	serving.Go(func() { health.Run(looking) })
	return func() {
		enough()
		web.Close()
		serving.Wait()
	}, nil
}

// door is a listener that bounds the connections that are open at once, and the
// share of one address (a /64 in IPv6), which is half, so that nobody keeps
// everybody else out. When there is no place, the connection that has been idle
// longest gives its up; where none is idle, the new one is closed.
type door struct {
	net.Listener
	most    int
	trusted []netip.Prefix // proxies, which come for many: no share

	Open   atomic.Int64 // connections
	Closed atomic.Int64 // that had to make place, or found none

	mu sync.Mutex

	// Guarded by mu.
	shares map[netip.Addr]*doorShare // by neighbourhood
	idle   list.List                 // of *guest: without a request, the longest first
}

// doorShare is what one address has of a door.
type doorShare struct {
	open int
	idle list.List // of *guest, as in door
}

// guest is one open connection.
type guest struct {
	net.Conn
	door *door
	addr netip.Addr

	// Guarded by door.mu.
	share *doorShare    // nil once it is closed
	all   *list.Element // in door.idle; nil while there is a request
	own   *list.Element // in share.idle, likewise
}

// limit makes l a door for most connections.
func limit(l net.Listener, most int, trusted []netip.Prefix) *door {
	return &door{Listener: l, most: most, trusted: trusted, shares: map[netip.Addr]*doorShare{}}
}

// Accept returns the next connection that finds a place.
func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		addr := netip.Addr{} // of a connection that has none
		if peer, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
			addr = peer.Addr().Unmap()
		}
		g := &guest{Conn: conn, door: d, addr: addr}
		leaver, ok := d.admit(g)
		if leaver != nil {
			leaver.Close()
		}
		if ok {
			return g, nil
		}
		d.Closed.Add(1)
		conn.Close()
	}
}

// admit takes g in if there is a place, or one that leaver gives up.
func (d *door) admit(g *guest) (leaver *guest, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	near := neighbourhood(g.addr)
	share := d.shares[near]
	if share == nil {
		share = &doorShare{}
	}
	var idle *list.List // who may have to leave
	switch {
	case share.open >= half(d.most) && !contains(d.trusted, g.addr):
		idle = &share.idle
	case int(d.Open.Load()) >= d.most:
		idle = &d.idle
	}
	if idle != nil {
		if idle.Len() == 0 {
			return nil, false
		}
		leaver = idle.Front().Value.(*guest)
		d.leave(leaver)
		d.Closed.Add(1)
	}
	d.shares[near] = share
	share.open++
	d.Open.Add(1)
	g.share = share
	d.rest(g)
	return leaver, true
}

// rest makes g idle, and stir busy. Both need mu.
func (d *door) rest(g *guest) {
	g.all, g.own = d.idle.PushBack(g), g.share.idle.PushBack(g)
}

func (d *door) stir(g *guest) {
	if g.all != nil {
		d.idle.Remove(g.all)
		g.share.idle.Remove(g.own)
		g.all, g.own = nil, nil
	}
}

// leave counts g out, once. It needs mu.
func (d *door) leave(g *guest) {
	if g.share == nil {
		return
	}
	d.stir(g)
	d.Open.Add(-1)
	if g.share.open--; g.share.open == 0 {
		delete(d.shares, neighbourhood(g.addr))
	}
	g.share = nil
}

// state is http.Server.ConnState: a connection is idle until its first whole
// header has come, and between two requests.
func (d *door) state(conn net.Conn, state http.ConnState) {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	g, ok := conn.(*guest)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if g.share != nil {
		d.stir(g)
		if state == http.StateIdle || state == http.StateNew {
			d.rest(g)
		}
	}
}

func (g *guest) Close() error {
	g.door.mu.Lock()
	g.door.leave(g)
	g.door.mu.Unlock()
	return g.Conn.Close()
}

// serverTLS is the server's side of TLS. A certificate is asked for where
// subscribers need one, and nothing is verified before a request is for a stream:
// a provider that has a certificate of its own must get in all the same.
func (c *Config) serverTLS(log *slog.Logger) (*tls.Config, error) {
	cert := keyPair(serverPair, c.CertFile, c.KeyFile)
	if err := cert.open(); err != nil {
		return nil, err
	}
	config := &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert.fresh(log), nil },
		MinVersion:     tls.VersionTLS12,
	}
	if c.Server.ClientCAFile != "" {
		config.ClientAuth = tls.RequestClientCert
	}
	return config, nil
}

// Metrics.

// counter, gauge and histogram are families of one value, and tallied one of a value
// for each of label's.
func counter(name, help string, v *atomic.Int64) Metric {
	return Metric{name, "counter", help, one(func() float64 { return float64(v.Load()) })}
}

func gauge(name, help string, v func() float64) Metric { return Metric{name, "gauge", help, one(v)} }

func histogram(name, help string, h *Histogram) Metric {
	return Metric{name, "histogram", help, func(sample sampler) {
		count := int64(0)
		for i := range h.counts {
			bound := "+Inf"
			if i < len(histogramBounds) {
				bound = strconv.FormatFloat(histogramBounds[i], 'g', -1, 64)
			}
			count += h.counts[i].Load()
			sample("_bucket", fmt.Sprintf("le=%q", bound), float64(count))
		}
		sample("_sum", "", time.Duration(h.sum.Load()).Seconds())
		sample("_count", "", float64(count))
	}}
}

func tallied(name, help, label string, t tally) Metric {
	return Metric{name, "counter", help, func(sample sampler) {
		for _, value := range slices.Sorted(maps.Keys(t)) {
			sample("", fmt.Sprintf("%s=%q", label, value), float64(t[value].Load()))
		}
	}}
}

// buildInfo says which build this is.
var buildInfo = Metric{"relay_build_info", "gauge", "The build: version, and the version of Go.", func(sample sampler) {
	sample("", fmt.Sprintf("version=%q,goversion=%q", version, runtime.Version()), 1)
}}

// truth is 1 when check holds.
func truth(check func(context.Context) error) float64 {
	if check(context.Background()) != nil {
		return 0
	}
	return 1
}

func serverMetrics(s *Server, hub *Hub, bus *RedisBus, d *door) []Metric {
	list := []Metric{
		buildInfo,
		{"relay_webhooks_total", "counter", "Webhooks by what became of them: each is counted once, when that is known.", func(sample sampler) {
			sample("", `outcome="accepted",reason=""`, float64(s.Accepted.Load()))
			sample("", `outcome="answered",reason=""`, float64(s.Answered.Load()))
			for _, reason := range lostReasons {
				sample("", fmt.Sprintf(`outcome="lost",reason=%q`, reason), float64(s.Lost[reason].Load()))
			}
			for _, reason := range webhookReasons {
				sample("", fmt.Sprintf(`outcome="refused",reason=%q`, reason), float64(s.Refused[reason].Load()))
			}
		}},
		histogram("relay_webhook_taken_seconds", "From a webhook's coming until a client has it, in accept mode.", &s.Taken),
		histogram("relay_webhook_answer_seconds", "From a webhook's coming until the target's answer, in status and response mode.", &s.Replied),
		gauge("relay_held_webhooks", "Webhooks held until a client has reported.", func() float64 { return float64(s.Held().Webhooks) }),
		gauge("relay_held_bytes", "Bytes of webhooks that are held, read or queued.", func() float64 { return float64(s.Held().Bytes) }),
		gauge("relay_held_limit_bytes", "Most bytes of webhooks that are held, read or queued.", func() float64 { return float64(s.Held().Limit) }),
		counter("relay_events_delivered_total", "Events queued for subscribers.", &hub.Delivered),
		counter("relay_events_full_total", "Times an event found a subscriber's queue full, and waited.", &hub.Full),
		gauge("relay_subscribers", "Live streams.", func() float64 { n, _ := hub.Count(); return float64(n) }),
		gauge("relay_channels", "Channels with subscribers.", func() float64 { _, n := hub.Count(); return float64(n) }),
		tallied("relay_subscribers_refused_total", "Streams and reports that were refused.", "reason", s.Rejected),
		counter("relay_subscribers_evicted_total", "Subscribers evicted because they were stuck.", &hub.Evicted),
		counter("relay_heartbeats_total", "Heartbeats queued.", &s.Heartbeats),
		gauge("relay_connections", "Connections to the port for webhooks and streams.", func() float64 { return float64(d.Open.Load()) }),
		counter("relay_connections_closed_total", "Connections closed because there was no place, or to make one.", &d.Closed),
	}
	if bus != nil {
		list = append(list,
			gauge("relay_redis_up", "1 while the replica is connected to Redis.", func() float64 { return truth(bus.Check) }),
			counter("relay_redis_sessions_total", "Times the connection to Redis came up.", &bus.Sessions),
			counter("relay_redis_received_total", "Events received from Redis.", &bus.Received),
		)
	}
	return list
}

// clientMetrics are those of all clients, with the channel as a label: the
// operator's own names.
func clientMetrics(clients []*Client) []Metric {
	list := metricsOf(&Client{})
	for i := range list {
		list[i].Collect = func(sample sampler) {
			for _, c := range clients {
				metricsOf(c)[i].Collect(func(suffix, labels string, value float64) {
					sample(suffix, strings.TrimSuffix(fmt.Sprintf("channel=%q,%s", c.channel, labels), ","), value)
				})
			}
		}
	}
	return append([]Metric{buildInfo}, list...)
}

func metricsOf(c *Client) []Metric {
	return []Metric{
		gauge("relay_stream_ready", "1 while the stream is ready and its last byte fresh.", func() float64 { return truth(c.Check) }),
		tallied("relay_subscribes_failed_total", "Tries to subscribe that did not succeed.", "reason", c.Denied),
		counter("relay_stream_ends_total", "Streams that ended after they were ready.", &c.Reconnects),
		counter("relay_events_total", "Events received.", &c.Events),
		histogram("relay_event_age_seconds", "Age of events when they arrive, beside the youngest seen.", &c.Age),
		counter("relay_events_duplicate_total", "Events dropped because they had come before.", &c.Duplicates),
		counter("relay_events_invalid_total", "Events refused.", &c.Invalid),
		counter("relay_events_overdue_total", "Events skipped because their sender had been answered already.", &c.Overdue),
		tallied("relay_forwards_total", "Webhooks that are done, by what the target said last, or why it said nothing.", "code", c.Forwards),
		counter("relay_forward_retries_total", "Attempts repeated.", &c.Retries),
		histogram("relay_forward_attempt_seconds", "One attempt at the target.", &c.Attempts),
		gauge("relay_forwards_in_flight", "Forwards under way.", func() float64 { return float64(len(c.slots)) }),
		counter("relay_reports_total", "Reports that arrived.", &c.Reports),
	}
}

// Configuration.

// Config is everything the environment sets.
type Config struct {
	Role             string
	LogLevel         slog.Level
	LogFormat        string // text, json or empty
	HealthPort       int
	DetectKubernetes bool
	Health           bool // the health service is wanted
	ShutdownDelay    time.Duration
	HandlerTimeout   time.Duration

	Port              int
	CertFile, KeyFile string
	Limits            Limits
	HeldBuffer        int64 // bytes of everything that is held, read or queued
	Server            ServerOptions
	Redis             RedisOptions
	Client            ClientOptions
	SourceCertFile    string
	SourceKeyFile     string
	Sources           []*url.URL
	Targets           byChannel[*url.URL]
	Strip             byChannel[bool]

	shown     slog.Value           // the settings as they may be logged
	listeners map[int]net.Listener // that the demo has opened, by port
}

// listen takes a port on all addresses.
func (c *Config) listen(port int) (net.Listener, error) {
	if l := c.listeners[port]; l != nil {
		return l, nil
	}
	return net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(port)))
}

// configError is one line for each mistake in the environment.
type configError struct{ text string }

func (e configError) Error() string { return e.text }

// setting declares one variable: the single source for parsing, defaults,
// validation, -help, the start-up log and the tables of the reference.
type setting struct {
	name     string
	fallback string
	role     string // server, client or both
	help     string
	set      func(string) error  // nil: accepted, and has no effect
	show     func(string) string // for the log; nil: as it is
}

// settings is the table, bound to c.
func settings(c *Config) []setting {
	s, l, r := &c.Server, &c.Limits, &c.Redis
	return []setting{
		{"RELAY_MODE", "", "both",
			"the role, server or client, or demo, which shows one webhook's way through both; required",
			into(&c.Role, oneOf("server", "client", "demo")), nil},
		{"AUTH_TOKEN", "", "both", "subscribers must send it as X-Auth-Token or Authorization: Bearer", into(&s.Token, parseHeader), hidden},
		{"AUTH_TOKENS_FILE", "", "server",
			"lines of channel and token, * for any channel, several per channel for rotation, # comments; re-read when it " +
				"changes; with AUTH_TOKEN set too, either is enough",
			into(&s.TokensFile, readable(parseTokens)), nil},
		{"WEBHOOK_SECRETS_FILE", "", "server",
			"lines of channel, scheme and secret, * for all other channels, several per channel for rotation, # comments: " +
				"webhooks of these channels need a signature; unsigned-get at the end lets GET, HEAD and OPTIONS without a " +
				"body pass; re-read when it changes",
			into(&s.SecretsFile, readable(parseSecrets)), nil},
		{"LOG_LEVEL", "info", "both", "debug, info, warn or error", into(&c.LogLevel, parseLevel), nil},
		{"LOG_FORMAT", "", "both", "text or json; by default text on a terminal, else json", into(&c.LogFormat, oneOf("text", "json")), nil},
		{"HEALTH_SERVICE_PORT", "9000", "both", "port of /live, /ready, /health, /metrics and the status page", into(&c.HealthPort, parsePort), nil},
		{"HEALTH_SERVICE_DETECT_KUBERNETES", "true", "both",
			"outside Kubernetes, start the health service only when its port is set",
			into(&c.DetectKubernetes, parseBool), nil},
		{"HEALTH_SERVICE_SHUTDOWN_DELAY", "5000", "both",
			"server: time between turning unready and asking streams to move, when the health service runs",
			into(&c.ShutdownDelay, duration(0, maxDuration)), nil},
		{"HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT", "10000", "both",
			"time to finish what is under way at the end",
			into(&c.HandlerTimeout, duration(time.Millisecond, maxDuration)), nil},
		{"SERVER_PORT", "3000", "server", "port for webhooks and streams", into(&c.Port, parsePort), nil},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT", "3mb", "server", "largest webhook body", into(&s.MaxPayload, parseSize), nil},
		{"SERVER_HEARTBEAT_INTERVAL", "5000", "server",
			"time between heartbeats on a stream",
			into(&s.Heartbeat, duration(heartbeatMinimum, heartbeatMaximum)), nil},
		{"SERVER_MAX_SUBSCRIBERS", "10000", "server", "most streams at once", into(&l.Subscribers, integer(1, 10_000_000)), nil},
		{"SERVER_MAX_SUBSCRIBERS_PER_ADDRESS", "5000", "server",
			"most streams at once from one remote address",
			into(&l.PerAddress, integer(1, 10_000_000)), nil},
		{"SERVER_SUBSCRIBER_BUFFER", "16mb", "server", "undelivered bytes of one subscriber; what does not fit waits", into(&l.Buffer, parseSize), nil},
		{"SERVER_HELD_BUFFER", "256mb", "server",
			"bytes of all webhooks that are held, read or queued; one channel may take half",
			into(&c.HeldBuffer, parseSize), nil},
		{"SERVER_HOLD_TIME", "60s", "server",
			"how long a webhook of accept mode waits for a client when none is there",
			into(&s.HoldTime, duration(5*time.Second, maxDuration)), nil},
		{"SERVER_STREAM_MAX_AGE", "", "server",
			"age at which streams are asked to move; none by default",
			into(&s.StreamMaxAge, duration(time.Second, maxDuration)), nil},
		{"SERVER_TLS_CERT_FILE", "", "server", "PEM certificate chain; re-read when it changes", into(&c.CertFile, parseText), nil},
		{"SERVER_TLS_KEY_FILE", "", "server", "PEM private key", into(&c.KeyFile, parseText), nil},
		{"SERVER_TLS_CLIENT_CA_FILE", "", "server",
			"PEM certificates: streams and reports need a client certificate that one of these issued, webhooks do not; " +
				"re-read when it changes",
			into(&s.ClientCAFile, readable(parseIssuers)), nil},
		{"RESPONSE_MODE", "accept", "server",
			"accept, status or response, and exceptions by channel: accept, slack=response",
			perChannel(&s.Modes, oneOf(modeAccept, modeStatus, modeResponse)), nil},
		{"RESPONSE_TIMEOUT", "9s", "server",
			"how long a sender may wait for the target in status and response mode; exceptions by channel: 9s, slack=2500",
			perChannel(&s.Timeouts, duration(10*time.Millisecond, maxResponseTimeout)), nil},
		{"SUBSCRIBE_ALLOWED_IPS", "", "server",
			"addresses and CIDR ranges that may subscribe; all by default",
			into(&s.SubscribeAllowed, listOf(parsePrefix)), nil},
		{"WEBHOOKS_ALLOWED_IPS", "", "server",
			"addresses and CIDR ranges that may send webhooks; all by default",
			into(&s.WebhooksAllowed, listOf(parsePrefix)), nil},
		{"TRUSTED_PROXIES", "", "server",
			"addresses and CIDR ranges whose X-Forwarded-For is believed; none by default",
			into(&s.TrustedProxies, listOf(parsePrefix)), nil},
		{"REDIS_URL", "", "server",
			"redis:// or rediss:// with user, password and db, or redis+sentinel://host:port,host:port/{master}/{db}: " +
				"makes replicas one relay",
			into(&r.Server, parseRedisURL), redacted},
		{"REDIS_CHANNEL_PREFIX", "webhook-relay:", "server", "begins the names of all Redis channels", into(&r.Prefix, parseText), nil},
		{"REDIS_RECONNECT_BACKOFF_FACTOR", "2", "server", "growth of the pause between tries to connect", into(&r.Backoff.Factor, number(1, 100)), nil},
		{"REDIS_RECONNECT_BACKOFF_INITIAL_TIMEOUT", "100", "server", "first pause", into(&r.Backoff.Initial, duration(time.Millisecond, maxDuration)), nil},
		{"REDIS_RECONNECT_BACKOFF_MAX_TIMEOUT", "1000", "server", "longest pause", into(&r.Backoff.Max, duration(time.Millisecond, maxDuration)), nil},
		{"REDIS_RECONNECT_BACKOFF_RANDOMIZE", "true", "server", "shorten each pause by a random part, up to half", into(&r.Backoff.Jitter, parseBool), nil},
		{"REDIS_MAX_RECONNECT_ATTEMPTS", "-1", "server",
			"tries in a row before the server exits with 1; -1: unlimited",
			into(&r.MaxAttempts, integer(-1, math.MaxInt32)), nil},
		{"REDIS_MAX_RETRIES_PER_REQUEST", "", "server", "accepted for compatibility, has no effect", nil, nil},
		{"REDIS_ENABLE_OFFLINE_QUEUE", "", "server", "accepted for compatibility, has no effect", nil, nil},
		{"REDIS_ENABLE_READY_CHECK", "", "server", "accepted for compatibility, has no effect", nil, nil},
		{"SOURCE_URL", "", "client",
			"the streams, with commas between: https://relay.example.com/subscribe/{channel}/; required",
			into(&c.Sources, listOf(parseSource)), redactedList},
		{"SOURCE_TLS_CERT_FILE", "", "client",
			"PEM certificate chain that is shown to the source; re-read when it changes",
			into(&c.SourceCertFile, parseText), nil},
		{"SOURCE_TLS_KEY_FILE", "", "client", "its PEM private key", into(&c.SourceKeyFile, parseText), nil},
		{"TARGET_BASE_URL", "", "client",
			"where webhooks go: path and query are appended; exceptions by channel: http://ci:8080, " +
				"slack=http://bot:3000/hooks; required",
			perChannel(&c.Targets, parseTargetURL), redactedList},
		{"TARGET_STRIP_PREFIX", "false", "client",
			"the target sees the path behind /webhooks/{channel}; exceptions by channel: false, slack=true",
			perChannel(&c.Strip, parseBool), nil},
		{"TARGET_RETRY_STATUSES", "429, 502, 503, 504", "client",
			"statuses of the target that are worth another try",
			into(&c.Client.RetryOn, listOf(parseStatus)), nil},
		{"RECONNECT_INTERVAL", "1000", "client",
			"first pause before the stream is opened again; grows to 5s, or 30s when the source refuses",
			into(&c.Client.ReconnectInterval, duration(time.Millisecond, maxDuration)), nil},
		{"TARGET_TIMEOUT", "30s", "client", "time for one attempt at the target", into(&c.Client.Timeout, duration(time.Millisecond, maxDuration)), nil},
		{"TARGET_RETRY_WINDOW", "60s", "client",
			"time in which attempts are repeated; 0: one attempt",
			into(&c.Client.RetryWindow, duration(0, maxDuration)), nil},
		{"TARGET_CONCURRENCY", "32", "client", "forwards at once; 1 keeps the order", into(&c.Client.Concurrency, integer(1, 100_000)), nil},
		{"CA_FILE", "", "both", "PEM roots trusted for source, target and Redis, besides the system's", into(&c.Client.Roots, parseRoots), nil},
		{"TARGET_INSECURE_SKIP_VERIFY", "false", "client", "do not verify the target's certificate", into(&c.Client.Insecure, parseBool), nil},
		{"HTTPS_PROXY", "", "client", "proxy for https", checkProxy, redacted},
		{"HTTP_PROXY", "", "client", "proxy for http", checkProxy, redacted},
		{"NO_PROXY", "", "client", "hosts that are reached without a proxy", nil, nil},
	}
}

// warning is something to know about the environment that stops nothing.
type warning struct {
	message string
	attrs   []any
}

// ours matches the names a typo would hide in; proxies what is for all programs.
var (
	ours    = regexp.MustCompile(`^(RELAY|SERVER|SOURCE|TARGET|RESPONSE|SUBSCRIBE|WEBHOOKS?|TRUSTED|REDIS|RECONNECT|HEALTH_SERVICE|AUTH_TOKENS?)_`)
	links   = regexp.MustCompile(`_SERVICE_HOST$|_PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?$`)
	proxies = regexp.MustCompile(`^(HTTPS?|NO|ALL|FTP)_PROXY$`)
)

// loadConfig reads environ. Its error names every mistake at once; what there is
// of a Config then tells how to log it.
func loadConfig(environ []string) (*Config, []warning, error) {
	env := map[string]string{}
	c := &Config{}
	var mistakes []string
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		env[name] = strings.TrimSpace(value)
		if name == "AUTH_TOKEN" && env[name] == "" { // what should have set it has not: that must not open the server
			mistakes = append(mistakes, "AUTH_TOKEN: set, but blank: give a token, or do not set it")
		}
	}
	var warnings []warning
	var names []string
	var shown []slog.Attr
	mode := strings.ToLower(env["RELAY_MODE"])
	for _, v := range settings(c) {
		names = append(names, v.name)
		given := env[v.name] != ""
		value := cmp.Or(env[v.name], v.fallback)
		switch {
		case v.role != "both" && v.role != mode && (mode == "server" || mode == "client"):
			if given && !proxies.MatchString(v.name) {
				warnings = append(warnings, warning{"variable is of the other role, and has no effect", []any{"variable", v.name, "role", v.role}})
			}
			continue
		case value == "":
			continue
		case v.set == nil:
			if !proxies.MatchString(v.name) {
				warnings = append(warnings, warning{"variable has no effect", []any{"variable", v.name}})
			}
		default:
			if v.fallback != "" { // a value may leave part of it: exceptions by channel
				v.set(v.fallback)
			}
			if err := v.set(value); err != nil {
				if v.show == nil {
					err = fmt.Errorf("%q: %w", value, err)
				}
				mistakes = append(mistakes, fmt.Sprintf("%s: %v", v.name, err))
				continue
			}
		}
		if v.show != nil {
			value = v.show(value)
		}
		if given {
			shown = append(shown, slog.String(v.name, value))
		}
	}
	c.shown = slog.GroupValue(shown...)
	c.Health = env["KUBERNETES_SERVICE_HOST"] != "" || env["HEALTH_SERVICE_PORT"] != "" || !c.DetectKubernetes
	if c.Role == "demo" && env["LOG_LEVEL"] == "" {
		c.LogLevel = slog.LevelWarn // what it shows is to be read
	}
	c.Server.HandlerTimeout, c.Client.HandlerTimeout = c.HandlerTimeout, c.HandlerTimeout
	c.Client.Token, c.Redis.Roots = c.Server.Token, c.Client.Roots
	if mistakes = append(mistakes, c.mistakes(mode, env)...); len(mistakes) > 0 {
		return c, nil, configError{strings.Join(mistakes, "\n")}
	}
	return c, append(warnings, strangers(env, names)...), nil
}

// mistakes are those that no variable makes alone.
func (c *Config) mistakes(mode string, env map[string]string) (list []string) {
	switch mode {
	case "":
		list = append(list, "RELAY_MODE: required, server, client or demo")
	case "client":
		for _, name := range []string{"SOURCE_URL", "TARGET_BASE_URL"} {
			if env[name] == "" {
				list = append(list, name+": required")
			}
		}
		list = append(list, c.checkChannels()...)
		list = append(list, checkPair(sourcePair, c.SourceCertFile, c.SourceKeyFile)...)
		if c.SourceCertFile != "" && slices.ContainsFunc(c.Sources, func(u *url.URL) bool { return u.Scheme != "https" }) {
			list = append(list, "SOURCE_TLS_CERT_FILE: needs an https SOURCE_URL")
		}
	case "server":
		if c.Port != 0 && c.Port == c.HealthPort && c.Health {
			list = append(list, "SERVER_PORT, HEALTH_SERVICE_PORT: must differ")
		}
		list = append(list, checkPair(serverPair, c.CertFile, c.KeyFile)...)
		if c.Server.ClientCAFile != "" && c.CertFile == "" {
			list = append(list, "SERVER_TLS_CLIENT_CA_FILE: needs SERVER_TLS_CERT_FILE and SERVER_TLS_KEY_FILE: "+
				"whoever ends TLS in front of the server sees the certificates, and nobody else")
		}
	}
	return list
}

// strangers warns about variables that are none of names, but look like them.
func strangers(env map[string]string, names []string) (warnings []warning) {
	for _, name := range slices.Sorted(maps.Keys(env)) {
		if slices.Contains(names, name) || linked(env, name) || proxies.MatchString(strings.ToUpper(name)) {
			continue
		}
		attrs, meant := []any{"variable", name}, nearest(name, names)
		if meant != "" {
			attrs = append(attrs, "meant", meant)
		}
		if meant != "" || ours.MatchString(name) {
			warnings = append(warnings, warning{"unknown variable", attrs})
		}
	}
	return warnings
}

// linked reports whether Kubernetes has set name by itself, for a Service that is
// called like something of ours
// (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
func linked(env map[string]string, name string) bool {
	service, port, found := strings.Cut(name, "_SERVICE_PORT")
	return links.MatchString(name) || strings.HasSuffix(name, "_PORT") && strings.Contains(env[name], "://") ||
		found && (port == "" || port[0] == '_') && env[service+"_SERVICE_HOST"] != ""
}

// nearest is the one of names that name was meant for: the fewest edits away, and no
// more than one for five letters. It is empty when none is.
func nearest(name string, names []string) string {
	for edits := range 8 { // no name has forty letters
		for _, other := range names {
			if edits <= len(other)/5 && nearly(edits, name, other) {
				return other
			}
		}
	}
	return ""
}

// nearly reports whether so many edits make b of a: letters put in, left out or
// changed, or neighbours swapped.
func nearly(edits int, a, b string) bool {
	for a != "" && b != "" && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	switch {
	case a == "" || b == "":
		return len(a)+len(b) <= edits
	case edits == 0, max(len(a)-len(b), len(b)-len(a)) > edits:
		return false
	case len(a) > 1 && len(b) > 1 && a[0] == b[1] && a[1] == b[0] && nearly(edits-1, a[2:], b[2:]):
		return true
	}
	return nearly(edits-1, a[1:], b[1:]) || nearly(edits-1, a[1:], b) || nearly(edits-1, a, b[1:])
}

// The variables that name a certificate and its key.
const (
	serverPair = "SERVER_TLS_CERT_FILE, SERVER_TLS_KEY_FILE"
	sourcePair = "SOURCE_TLS_CERT_FILE, SOURCE_TLS_KEY_FILE"
)

// checkPair is what is wrong with a certificate and its key, which variables name.
func checkPair(variables, cert, key string) []string {
	if (cert == "") != (key == "") {
		return []string{variables + ": set both or neither"}
	}
	if cert != "" {
		if _, err := keyPair(variables, cert, key).look(); err != nil {
			return []string{fmt.Sprintf("%s: %v", variables, err)}
		}
	}
	return nil
}

// clientOf is what the client of one source is told.
func (c *Config) clientOf(source *url.URL) ClientOptions {
	opts, channel := c.Client, sourceChannel(source)
	opts.Source, opts.Target, opts.StripPrefix = source, c.Targets.of(channel), c.Strip.of(channel)
	opts.UserAgent = "webhook-relay/" + version
	return opts
}

// checkChannels is what is wrong between sources and targets.
func (c *Config) checkChannels() (mistakes []string) {
	known := map[string]bool{}
	for _, source := range c.Sources {
		channel := sourceChannel(source)
		if known[channel] {
			mistakes = append(mistakes, fmt.Sprintf("SOURCE_URL: channel %q comes twice", channel))
		}
		known[channel] = true
		if c.Targets.Default == nil && len(c.Targets.Named) > 0 && c.Targets.Named[channel] == nil {
			mistakes = append(mistakes, fmt.Sprintf("TARGET_BASE_URL: names no target for channel %q, and no default", channel))
		}
	}
	strangers := func(variable string, channels iter.Seq[string]) {
		for _, channel := range slices.Sorted(channels) {
			if len(known) > 0 && !known[channel] {
				mistakes = append(mistakes, fmt.Sprintf("%s: no SOURCE_URL has channel %q", variable, channel))
			}
		}
	}
	strangers("TARGET_BASE_URL", maps.Keys(c.Targets.Named))
	strangers("TARGET_STRIP_PREFIX", maps.Keys(c.Strip.Named))
	return mistakes
}

// printHelp writes the table of variables.
func printHelp(w io.Writer) {
	fmt.Fprintf(w, "webhook-relay %s brings webhooks into clusters that the internet cannot reach.\n\n"+
		"usage: RELAY_MODE=server|client|demo webhook-relay [-help] [-version] [-probe live|ready|health]\n\n"+
		"-probe asks the health service on this machine, at HEALTH_SERVICE_PORT, and exits with 0 or 1.\n"+
		"Durations are milliseconds or Go durations (5s); sizes are bytes or take kb, mb, gb.\n\n", version)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range settings(&Config{}) {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", v.name, v.role, cmp.Or(v.fallback, "-"), v.help)
	}
	t.Flush()
}

// isTerminal reports whether w is one: there are people.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// newLogger logs to w: text for people, JSON for machines.
func newLogger(c *Config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // milliseconds, as all times in the log
			a.Value = slog.Int64Value(a.Value.Duration().Milliseconds())
		}
		return a
	}}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if c.LogFormat == "text" {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(hush{handler, new(sync.Mutex), map[string]*quota{}})
}

// hush bounds the log, most of whose lines strangers can cause. Messages are
// constant, so each has a share of its own and none drowns another; its next
// line tells how many were left out.
type hush struct {
	slog.Handler

	// Shared by all handlers of one log.
	mu     *sync.Mutex
	quotas map[string]*quota // by message; all guarded by mu
}

// quota is what one message has had.
type quota struct {
	second  int64 // Unix time
	lines   int   // in that second
	omitted int   // since the last line that was written
}

func (h hush) Handle(ctx context.Context, r slog.Record) error {
	if r.Level <= slog.LevelDebug {
		return h.Handler.Handle(ctx, r)
	}
	h.mu.Lock()
	q := h.quota(r.Message)
	omitted, over := q.omitted, q.spent()
	if !over {
		q.lines++
		q.omitted = 0
	}
	h.mu.Unlock()
	if over {
		return nil
	}
	if omitted > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("omitted", omitted))
	}
	err := h.Handler.Handle(ctx, r)
	if err != nil {
		h.mu.Lock()
		q.omitted += omitted + 1
		h.mu.Unlock()
	}
	return err
}

// Silent reports whether a line with message would be left out, and counts it then:
// who asks first need not make it.
func (h hush) Silent(message string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.quota(message).spent()
}

// quota is message's, of this second. It needs mu.
func (h hush) quota(message string) *quota {
	q := h.quotas[message]
	if q == nil {
		q = &quota{}
		h.quotas[message] = q
	}
	if now := time.Now().Unix(); q.second != now {
		q.second, q.lines = now, 0
	}
	return q
}

// spent reports whether no line is left, and counts one that is left out then. It
// needs hush.mu.
func (q *quota) spent() bool {
	over := q.lines >= hushLines
	if over {
		q.omitted++
	}
	return over
}

func (h hush) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

func (h hush) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}

const (
	logQueueLimit = 1024        // that wait to be written
	logQueueTime  = time.Second // for those that wait at the end
)

// logQueue writes from a goroutine of its own: a log that nobody takes, such as a
// pipe that is full, must not stop those who write to it, of whom some hold locks.
// What finds no place is left out, which is an error.
type logQueue struct {
	to    io.Writer
	lines chan []byte
	over  chan struct{} // closed when nothing more is to come
	done  chan struct{} // closed when all of it is written
}

func newLogQueue(to io.Writer) *logQueue {
	o := &logQueue{to, make(chan []byte, logQueueLimit), make(chan struct{}), make(chan struct{})}
	go o.run()
	return o
}

// run writes until close, and what waits then.
func (o *logQueue) run() {
	defer close(o.done)
	for {
		select {
		case line := <-o.lines:
			o.to.Write(line)
		case <-o.over:
			for len(o.lines) > 0 { // nobody else takes them
				o.to.Write(<-o.lines)
			}
			return
		}
	}
}

func (o *logQueue) Write(p []byte) (int, error) {
	select {
	case o.lines <- bytes.Clone(p):
		return len(p), nil
	default:
		return 0, errFull
	}
}

var errFull = errors.New("too many lines wait to be written")

// close waits until all is written, if somebody takes it.
func (o *logQueue) close() {
	close(o.over)
	select {
	case <-o.done:
	case <-time.After(logQueueTime):
	}
}

// What a value may look like in the log.

func hidden(string) string { return "[redacted]" }

// redacted is a URL without credentials and query.
func redacted(value string) string {
	if scheme, rest, _ := strings.Cut(value, "://"); scheme == "redis+sentinel" { // several hosts, which url.Parse refuses
		rest = rest[strings.LastIndexByte(rest, '@')+1:]
		rest, _, _ = strings.Cut(rest, "?")
		return scheme + "://" + rest
	}
	u, err := url.Parse(value)
	if err != nil || u.Host == "" {
		return "[redacted]"
	}
	if u.User != nil {
		u.User = url.User("redacted")
	}
	u.RawQuery, u.Fragment, u.ForceQuery = "", "", false
	return u.String()
}

// redactedList is redacted for each element of a list, maybe named.
func redactedList(value string) string {
	parts := strings.Split(value, ",")
	for i, part := range parts {
		name, u, named := strings.Cut(strings.TrimSpace(part), "=")
		if named && validName(strings.TrimSpace(name)) {
			parts[i] = name + "=" + redacted(strings.TrimSpace(u))
		} else {
			parts[i] = redacted(strings.TrimSpace(part))
		}
	}
	return strings.Join(parts, ", ")
}

// Parsers of values. The error of each says what is wanted, and does not repeat
// the value.

// into stores in dst what parse reads.
func into[T any](dst *T, parse func(string) (T, error)) func(string) error {
	return func(v string) error {
		parsed, err := parse(v)
		if err == nil {
			*dst = parsed
		}
		return err
	}
}

func parseText(v string) (string, error) { return v, nil }

// readable reads the name of a watched file that parse can read.
func readable[T any](parse func(string) (T, error)) func(string) (string, error) {
	return func(v string) (string, error) {
		_, err := (&watched[T]{name: v, parse: parse}).look()
		return v, err
	}
}

// parseHeader reads a text that can be sent as a header value.
func parseHeader(v string) (string, error) {
	if checkHeaders([]Header{{"Token", []string{v}}}) != nil {
		return "", errors.New("must not hold control characters")
	}
	return v, nil
}

func oneOf(choices ...string) func(string) (string, error) {
	return func(v string) (string, error) {
		if v = strings.ToLower(v); !slices.Contains(choices, v) {
			return "", errors.New("must be " + strings.Join(choices, " or "))
		}
		return v, nil
	}
}

func parseLevel(v string) (level slog.Level, err error) {
	if level.UnmarshalText([]byte(v)) != nil {
		err = errors.New("must be debug, info, warn or error")
	}
	return level, err
}

func parseBool(v string) (bool, error) {
	b, err := strconv.ParseBool(strings.ToLower(v))
	if err != nil {
		return false, errors.New("must be true or false")
	}
	return b, nil
}

func integer(least, most int) func(string) (int, error) {
	return func(v string) (int, error) {
		n, err := strconv.Atoi(v)
		if err != nil || n < least || n > most {
			return 0, fmt.Errorf("must be a whole number from %d to %d", least, most)
		}
		return n, nil
	}
}

func number(least, most float64) func(string) (float64, error) {
	return func(v string) (float64, error) {
		f, err := strconv.ParseFloat(v, 64)
		if err != nil || !(f >= least && f <= most) {
			return 0, fmt.Errorf("must be a number from %g to %g", least, most)
		}
		return f, nil
	}
}

func parsePort(v string) (int, error) {
	n, err := integer(0, 65535)(v)
	if err != nil {
		return 0, errors.New("must be a port from 0 to 65535; 0 picks a free one")
	}
	return n, nil
}

// duration reads milliseconds or a Go duration.
func duration(least, most time.Duration) func(string) (time.Duration, error) {
	return func(v string) (time.Duration, error) {
		d, err := time.ParseDuration(v)
		if ms, msErr := strconv.ParseInt(v, 10, 64); msErr == nil && ms >= 0 && ms <= maxDuration.Milliseconds() {
			d, err = time.Duration(ms)*time.Millisecond, nil
		}
		if err != nil || d < least || d > most {
			return 0, fmt.Errorf("must be milliseconds or a duration such as 5s, from %v to %v", least, most)
		}
		return d, nil
	}
}

// parseSize reads bytes, with kb, mb or gb as powers of 1024.
func parseSize(v string) (int64, error) {
	digits := strings.ToLower(v)
	unit := 1.0
	for i, suffix := range []string{"kb", "mb", "gb"} {
		if rest, ok := strings.CutSuffix(digits, suffix); ok {
			digits, unit = strings.TrimSpace(rest), math.Pow(1024, float64(i+1))
			break
		}
	}
	n, err := strconv.ParseFloat(strings.TrimSuffix(digits, "b"), 64)
	if n *= unit; err != nil || !(n >= 1 && n <= 1<<40) {
		return 0, errors.New("must be a size such as 512kb or 3mb, from 1 byte to 1024gb")
	}
	return int64(n), nil
}

// perChannel stores in dst a default and exceptions, "accept, slack=response": what
// is left out stays as it was.
func perChannel[T any](dst *byChannel[T], parse func(string) (T, error)) func(string) error {
	return func(v string) error {
		seen := map[string]bool{}
		for i, part := range strings.Split(v, ",") {
			channel, value, named := strings.Cut(strings.TrimSpace(part), "=")
			if channel = strings.TrimSpace(channel); !named || strings.Contains(channel, "://") { // a URL may have a query
				channel, value, named = "", part, false
			}
			parsed, err := parse(strings.TrimSpace(value))
			switch {
			case err != nil:
				return err
			case named && !validName(channel):
				return errors.New("a channel is 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
			case seen[channel]:
				return errors.New("a channel comes twice")
			case named:
				seen[channel] = true
				if dst.Named == nil {
					dst.Named = map[string]T{}
				}
				dst.Named[channel] = parsed
			case i > 0:
				return errors.New("the default comes first, and once")
			default:
				dst.Default = parsed
			}
		}
		return nil
	}
}

// listOf reads elements with commas, or spaces, between.
func listOf[T any](parse func(string) (T, error)) func(string) ([]T, error) {
	return func(v string) (all []T, err error) {
		for part := range strings.FieldsFuncSeq(v, func(r rune) bool { return r == ',' || unicode.IsSpace(r) }) {
			one, err := parse(part)
			if err != nil {
				return nil, err
			}
			all = append(all, one)
		}
		if all == nil {
			return nil, errors.New("must not be empty")
		}
		return all, nil
	}
}

// parsePrefix reads a CIDR range or a bare address, and turns IPv4 mapped
// into IPv6 back into IPv4.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, errors.New("must be addresses or CIDR ranges, with commas between")
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return p, errors.New("range of IPv4-mapped addresses is wider than IPv4")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// parseWebURL reads an http or https URL.
func parseWebURL(v string) (*url.URL, error) {
	u, err := url.Parse(v)
	switch {
	case err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "":
		return nil, errors.New("must be an http or https URL")
	case u.Fragment != "":
		return nil, errors.New("must have no fragment")
	case u.Path != "" && checkPath(u.EscapedPath()) != nil:
		return nil, errors.New("must have no dot segments in its path")
	case strings.HasPrefix(u.Path, "//"):
		return nil, errors.New("must not begin its path with two slashes")
	}
	if _, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16); err != nil {
		return nil, errors.New("must have a port up to 65535")
	}
	return u, nil
}

// parseTargetURL reads the base of a target.
func parseTargetURL(v string) (*url.URL, error) {
	u, err := parseWebURL(v)
	if err == nil && (u.ForceQuery || checkQuery(u.RawQuery) != nil) {
		err = errors.New("must have no empty query")
	}
	return u, err
}

// parseSource reads a URL that ends in /subscribe/{channel}, maybe with a slash:
// anything else would be another service, or the way in for webhooks.
func parseSource(v string) (*url.URL, error) {
	u, err := parseWebURL(v)
	if err != nil {
		return nil, err
	}
	path := strings.TrimSuffix(u.EscapedPath(), "/")
	if !strings.HasSuffix(path[:strings.LastIndexByte(path, '/')+1], "/subscribe/") || !validName(sourceChannel(u)) {
		return nil, errors.New("must end in /subscribe/{channel}, such as https://relay.example.com/subscribe/ci/")
	}
	return u, nil
}

// parseStatus reads a status that tells of a failure.
func parseStatus(v string) (int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n < 400 || http.StatusText(n) == "" {
		return 0, errors.New("must be statuses from 400 to 599 that HTTP knows, with commas between")
	}
	return n, nil
}

// checkProxy checks what net/http itself reads from the environment; without a
// scheme it takes http.
func checkProxy(v string) error {
	if !strings.Contains(v, "://") {
		v = "http://" + v
	}
	u, err := url.Parse(v)
	if err != nil || u.Hostname() == "" || !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) {
		return errors.New("must be an http, https or socks5 URL")
	}
	return nil
}

// parseRoots reads PEM certificates and adds them to the system's.
func parseRoots(v string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	pem, err := os.ReadFile(v)
	if err != nil {
		return nil, errors.New("must be a readable file")
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("must hold PEM certificates")
	}
	return pool, nil
}
