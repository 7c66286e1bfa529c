package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/netip"
	"net/textproto"
	"net/url"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// onlyMessage parses an SSE block with the client's parser. It must be exactly
// one unnamed event of one data line.
func onlyMessage(t testing.TB, frame []byte) message {
	t.Helper()
	p := newParser(bytes.NewReader(frame))
	m, err := p.next()
	if err != nil || m.name != "message" {
		t.Fatalf("frame %q is no message: %q, %v", frame, m.name, err)
	}
	m.data = bytes.Clone(m.data)
	if extra, err := p.next(); err == nil {
		t.Fatalf("frame %q holds a second event %q", frame, extra.name)
	}
	if bytes.ContainsAny(m.data, "\r\n") {
		t.Fatalf("data %q is more than one line", m.data)
	}
	return m
}

// decodeOwn is decodeWebhook by a client of the very channel of the event.
func decodeOwn(data []byte) (*Webhook, error) {
	var m struct{ OriginalURL string }
	json.Unmarshal(data, &m) // decodeWebhook says what is wrong with it
	target, _ := latin1(m.OriginalURL)
	parsed, _ := parseTarget(target)
	return decodeWebhook(parsed.Channel, data)
}

// opened is the webhook in a frame.
func opened(t testing.TB, frame []byte) *Webhook {
	t.Helper()
	w, err := decodeOwn(onlyMessage(t, frame).data)
	if err != nil {
		t.Fatalf("decode %q: %v", frame, err)
	}
	return w
}

// sameWebhook compares every byte that the target could tell apart.
func sameWebhook(t testing.TB, got, want *Webhook) {
	t.Helper()
	if got.ID != want.ID || got.Method != want.Method || got.Path != want.Path || got.Query != want.Query {
		t.Fatalf("decoded %q %q %q%q, want %q %q %q%q", got.ID, got.Method, got.Path, got.Query, want.ID, want.Method, want.Path, want.Query)
	}
	equal := func(a, b Header) bool { return a.Name == b.Name && slices.Equal(a.Values, b.Values) }
	if !slices.EqualFunc(got.Headers, want.Headers, equal) {
		t.Fatalf("decoded headers %q, want %q", got.Headers, want.Headers)
	}
	if !bytes.Equal(got.Body, want.Body) {
		t.Fatalf("decoded body %q, want %q", got.Body, want.Body)
	}
	if !got.Time.Equal(want.Time) || got.Respond != want.Respond || got.Brief != want.Brief || got.Timeout != want.Timeout {
		t.Fatalf("decoded %v %v %v %v, want %v %v %v %v", got.Time, got.Respond, got.Brief, got.Timeout, want.Time, want.Respond, want.Brief, want.Timeout)
	}
}

var wireTime = time.UnixMilli(1700000000000)

// TestWireShape holds the one encoding to the letter, since clients of
// another make and version read it.
func TestWireShape(t *testing.T) {
	hook := func(query string, body string, headers ...Header) *Webhook {
		return &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci/p", Query: query, Headers: headers, Body: []byte(body), Time: wireTime}
	}
	respond := func(w *Webhook, brief bool) *Webhook {
		w.Respond, w.Brief, w.Timeout = true, brief, 9*time.Second
		return w
	}
	const (
		front = `{"id":"r-1","method":"POST","originalUrl":"/webhooks/ci/p","path":"/webhooks/ci/p","query":{},"headers":`
		end   = `,"timestamp":1700000000000`
	)
	for _, tc := range []struct {
		name string
		w    *Webhook
		want string
	}{
		{"plain", hook("", "{}", Header{"Content-Type", []string{"application/json"}}, Header{"Host", []string{"h:1"}}),
			front + `{"content-type":"application/json","host":"h:1","content-length":"2"},"body":"{}"` + end + `}`},
		{"empty body", hook("", ""), front + `{"content-length":"0"},"body":""` + end + `}`},
		{"the sender waits", respond(hook("", ""), false), front + `{"content-length":"0"},"body":""` + end + `,"respond":true,"timeout":9000}`},
		{"for the status alone", respond(hook("", ""), true), front + `{"content-length":"0"},"body":""` + end + `,"mode":"status","respond":true,"timeout":9000}`},
		{"latin1 values", hook("", "", Header{"X-A", []string{"caf\xe9 \x80\xff\t"}}), front + "{\"x-a\":\"caf\u00e9 \u0080\u00ff\\t\",\"content-length\":\"0\"},\"body\":\"\"" + end + `}`},
		{"quotes in values", hook("", "", Header{"X-A", []string{`"\"`}}), front + `{"x-a":"\"\\\"","content-length":"0"},"body":""` + end + `}`},
		{"repeated header", hook("", "", Header{"X-Dup", []string{"one", "two", "one"}}), front + `{"x-dup":["one","two","one"],"content-length":"0"},"body":""` + end + `}`},
		{"set-cookie is an array even alone", hook("", "", Header{"Set-Cookie", []string{"a=b"}}), front + `{"set-cookie":["a=b"],"content-length":"0"},"body":""` + end + `}`},
		{"text of any kind", hook("", "a\u2028b\x00\"\\\n\r\t\x1f\x7f\u00e9<&>"), front + "{\"content-length\":\"18\"},\"body\":\"a\u2028b\\u0000\\\"\\\\\\n\\r\\t\\u001f\x7f\u00e9<&>\"" + end + `}`},
		{"not UTF-8", hook("", "\xff\x00\xfe"), front + `{},"bodyBase64":"/wD+"` + end + `}`},
		{"not UTF-8, with headers", hook("", "\xff", Header{"A", []string{"b"}}), front + `{"a":"b"},"bodyBase64":"/w=="` + end + `}`},
		{"surrogates are not UTF-8", hook("", "\xed\xa0\x80"), front + `{},"bodyBase64":"7aCA"` + end + `}`},
		{"query", hook("?b=2&a=1&b=3&c", "", []Header{}...),
			`{"id":"r-1","method":"POST","originalUrl":"/webhooks/ci/p?b=2&a=1&b=3&c","path":"/webhooks/ci/p","query":{"a":"1","b":["2","3"],"c":""},"headers":{"content-length":"0"},"body":""` + end + `}`},
		{"query that net/url cannot read", hook("?x=1;y=2&sig=%zz&ok=%ff%22", ""),
			`{"id":"r-1","method":"POST","originalUrl":"/webhooks/ci/p?x=1;y=2&sig=%zz&ok=%ff%22","path":"/webhooks/ci/p","query":{"ok":"\ufffd\""},"headers":{"content-length":"0"},"body":""` + end + `}`},
		{"bytes above ASCII in the target", &Webhook{ID: "r-1", Method: "PURGE", Path: "/webhooks/ci/\xe9", Query: "?\xff", Time: wireTime},
			"{\"id\":\"r-1\",\"method\":\"PURGE\",\"originalUrl\":\"/webhooks/ci/\u00e9?\u00ff\",\"path\":\"/webhooks/ci/\u00e9\",\"query\":{\"\\ufffd\":\"\"},\"headers\":{\"content-length\":\"0\"},\"body\":\"\"" + end + `}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := eventOf("ci", tc.w)
			if want := "id: r-1\ndata: " + tc.want + "\n\n"; string(e.frame) != want {
				t.Errorf("frame\n%q, want\n%q", e.frame, want)
			}
			if !json.Valid(onlyMessage(t, e.frame).data) {
				t.Error("data is not JSON")
			}
			if e.ID != "r-1" || e.Channel != "ci" || e.Respond != tc.w.Respond || e.Only != "" {
				t.Errorf("event %q %q %v %q", e.ID, e.Channel, e.Respond, e.Only)
			}
		})
	}
}

// headersOf reads "name: value" lines as a server captures them: names are
// tokens in canonical form, values are any bytes without LF.
func headersOf(lines string) map[string][]string {
	h := map[string][]string{}
	for line := range strings.SplitSeq(lines, "\n") {
		name, value, _ := strings.Cut(line, ":")
		if token(name) {
			name = textproto.CanonicalMIMEHeaderKey(name)
			h[name] = append(h[name], strings.TrimSpace(value))
		}
	}
	return h
}

// eventOf is the event of w.
func eventOf(channel string, w *Webhook) *Event {
	size, text := w.wireSize()
	return newEvent(channel, w, size, text)
}

// FuzzWebhook states what the wire is for: what a server captured arrives,
// byte for byte, on the first delivery, on every later one, and over another
// replica; and what could not be sent on is refused by the receiver.
func FuzzWebhook(f *testing.F) {
	f.Add("POST", "/webhooks/ci/p?x=1;y=2&sig=%zz", "x-dup: one\nx-dup: two\nset-cookie: a\nauthorization: Bearer x", []byte(`{"a":"\u2028 é"}`), true, false, int64(9000))
	f.Add("PATCH", "/webhooks/x//y%2Fz/\xe9?", "x-bytes: \x80\xff\t!", []byte("\x00\r\n\xff"), true, true, int64(-1))
	f.Add("delete", "/webhooks/x/../y", "connection: x-a\nx-a: gone\nx-relay-event-id: forged\ncontent-length: 7", []byte(nil), false, true, int64(math.MaxInt64))
	f.Add("G ET", "http://evil/a b?c d", "a: \x00", []byte("\u2028\x7f"), false, false, int64(0))
	f.Add("POST", "/webhooks/ci", "", bytes.Repeat([]byte{1}, 17<<10), false, false, int64(0)) // too long in JSON
	f.Fuzz(func(t *testing.T, method, target, lines string, body []byte, respond, brief bool, ms int64) {
		w := &Webhook{
			ID: newID(testReplica), Method: method, Headers: endToEnd(headersOf(lines)), Body: body, Time: wireTime,
			Respond: respond, Brief: brief, Timeout: time.Duration(ms),
		}
		parsed, err := parseTarget(target)
		if err != nil || method == "" {
			t.Skip("no server takes such a request")
		}
		w.Path, w.Query = parsed.Path, parsed.Query
		empty := *w
		empty.Body = nil
		size, text := w.wireSize()
		without, _ := empty.wireSize()
		if _, spelled, _ := bytes.Cut(appendBody(nil, body, text), []byte(`":"`)); size-without != len(spelled)-1 {
			t.Fatalf("body %q counts for %d bytes, want %d", body, size-without, len(spelled)-1)
		}
		e := eventOf("ci", w)
		m := onlyMessage(t, e.frame)
		if m.id != w.ID {
			t.Fatalf("id %q, want %q", m.id, w.ID)
		}
		var loose struct {
			Path  string
			Body  *string
			Query map[string]any
		}
		if err := json.Unmarshal(m.data, &loose); err != nil {
			t.Fatalf("data %q: %v", m.data, err)
		}
		if utf8.Valid(body) != text && len(body) <= 16<<10 || text != (loose.Body != nil) || text && *loose.Body != string(body) {
			t.Fatalf("body %q does not say %q", m.data, body)
		}
		if p, ok := latin1(loose.Path); !ok || p != w.Path {
			t.Fatalf("path %q, want %q", p, w.Path)
		}
		over, err := openEvent("ci", e.wire)
		if err != nil || over.ID != e.ID || over.Respond != respond || over.Only != "" || !bytes.Equal(over.frame, e.frame) {
			t.Fatalf("event over a replica: %+v, %v", over, err)
		}
		if _, err := openEvent("i", e.wire); err == nil {
			t.Fatal("an event of another channel is taken")
		}
		if parsed.webhook() != nil || w.check() != nil {
			if got, err := decodeOwn(m.data); err == nil {
				t.Fatalf("decoded %+v, which could not be sent on", got)
			}
			return
		}
		want := *w
		for _, left := range []time.Duration{w.Timeout, 1234567 * time.Microsecond, -time.Second} {
			if want.Timeout = 0; respond {
				want.Timeout = min(max(left.Truncate(time.Millisecond), 0), maxResponseTimeout)
			}
			frame := e.frame
			if left != w.Timeout {
				before := bytes.Clone(e.frame)
				again := e.again("subscriber", left)
				if !bytes.Equal(e.frame, before) {
					t.Fatal("again changed the event that others share")
				}
				over, err := openEvent("ci", again.wire)
				if err != nil || over.Only != "subscriber" || again.Only != "subscriber" || over.ID != e.ID || over.Respond != respond {
					t.Fatalf("later delivery over a replica: %+v, %v", over, err)
				}
				if frame = over.frame; !bytes.Equal(frame, again.frame) {
					t.Fatal("frames differ between replicas")
				}
			}
			sameWebhook(t, opened(t, frame), &want)
		}
	})
}

// FuzzOpenEnvelope feeds what may come over Redis, from another version or
// from anybody who can publish there.
func FuzzOpenEnvelope(f *testing.F) {
	sig := Signal{Kind: signalTaken, To: "a", From: "b", Channel: "c", Event: "d", Subscriber: "e", Client: "f", Data: "g"}
	f.Add(sig.encode())
	f.Add(eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/x", Respond: true}).again("s", time.Second).wire)
	f.Add([]byte{})
	f.Add([]byte{envelopeVersion})
	f.Add([]byte{envelopeVersion, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, wire []byte) {
		if e, err := openEvent("ci", wire); err == nil {
			again, err := openEvent("ci", append(e.appendEnvelope(nil), e.frame...))
			if err != nil || again.ID != e.ID || again.Only != e.Only || again.Respond != e.Respond || !bytes.Equal(again.frame, e.frame) {
				t.Fatalf("event %+v came back as %+v, %v", e, again, err)
			}
		}
		if sig, err := openSignal(wire); err == nil {
			if again, err := openSignal(sig.encode()); err != nil || again != sig {
				t.Fatalf("signal %+v came back as %+v, %v", sig, again, err)
			}
		}
		// Any strings make the round trip, whatever they hold.
		s := string(wire)
		sig := Signal{Kind: s, To: s, From: "x", Channel: s, Event: "", Subscriber: s, Client: s, Data: s}
		if again, err := openSignal(sig.encode()); err != nil || again != sig {
			t.Fatalf("signal %+v came back as %+v, %v", sig, again, err)
		}
	})
}

// TestEnvelopeVersion: a replica of a later version must not be misread.
func TestEnvelopeVersion(t *testing.T) {
	e := eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/x"})
	sig := Signal{Kind: signalReady}
	for _, version := range []byte{0, envelopeVersion - 1, envelopeVersion + 1, 255} {
		wire, signal := bytes.Clone(e.wire), sig.encode()
		wire[0], signal[0] = version, version
		if _, err := openEvent("ci", wire); err == nil {
			t.Errorf("event of version %d was opened", version)
		}
		if _, err := openSignal(signal); err == nil {
			t.Errorf("signal of version %d was opened", version)
		}
	}
	for n := range len(e.wire) - len(e.frame) {
		if _, err := openEvent("ci", e.wire[:n]); err == nil {
			t.Errorf("the first %d bytes of an envelope were opened", n)
		}
	}
}

func TestEndToEnd(t *testing.T) {
	for _, tc := range []struct{ name, lines, want string }{
		{"nothing", "", ""},
		{"sorted by name, values in order", "B: 2\nA: z\nB: 1", "A: z\nB: 2\nB: 1"},
		{"named in Connection", "Connection: close, X-One ,x-two\nConnection: x-three\nX-One: 1\nX-Two: 2\nX-Three: 3\nX-Four: 4", "X-Four: 4"},
		{"named in Connection, the relay's own list stays", "Connection: ,,\nAccept: a", "Accept: a"},
		{"the fixed list", "Connection: x\nProxy-Connection: x\nKeep-Alive: x\nTE: x\nTransfer-Encoding: chunked\nUpgrade: h2c\nTrailer: x\nProxy-Authenticate: x\nProxy-Authorization: x\nContent-Length: 1\nExpect: 100-continue\nTe-X: 1", "Te-X: 1"},
		{"the relay's own names", "X-Relay-Event-Id: forged\nx-relay-anything: 1\nX-RELAY-CLIENT: x\nX_Relay_Event_Id: forged\nx_relay-a: 1\nX-Relayed: 1", "X-Relayed: 1"},
		{"everything else", "Authorization: Bearer t\nCookie: a=b\nX-Forwarded-For: 10.0.0.1\nEmpty:", "Authorization: Bearer t\nCookie: a=b\nEmpty: \nX-Forwarded-For: 10.0.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := headersOf(tc.lines)
			in["No-Values"] = nil
			var got []string
			for _, h := range endToEnd(in) {
				for _, v := range h.Values {
					got = append(got, h.Name+": "+v)
				}
			}
			if joined := strings.Join(got, "\n"); joined != tc.want {
				t.Errorf("got\n%s\nwant\n%s", joined, tc.want)
			}
		})
	}
}

var pathCases = []struct {
	path string
	ok   bool
}{
	{"/", true}, {"/a", true}, {"/a/", true}, {"//a//", true}, {"/a%2Fb", true}, {"/a%2f%2Fb", true}, {"/%25", true}, {"/a;v=1/b", true},
	{"/...", true}, {"/.a", true}, {"/a.", true}, {"/..a", true}, {"/a..", true}, {"/.well-known/x", true}, {"/a%20b", true}, {"/\xe9%e9", true},
	{"/%252e%252e/x", true}, {"/a..;x/b", true}, {"/a?b", true}, {"/@evil", true}, {"/http://evil/", true}, {"/%40", true}, {"/:80", true},
	{"", false}, {"a", false}, {"?x", false}, {"*", false}, {"http://h/", false},
	{"/..", false}, {"/.", false}, {"/../x", false}, {"/a/../b", false}, {"/a/./b", false}, {"/a/..", false}, {"/a//../b", false},
	{"/%2e%2e/x", false}, {"/%2E./x", false}, {"/.%2e", false}, {"/%2e", false}, {"/a%2f..%2fb", false}, {"/a%2F%2e%2E", false}, {"/..%2fx", false},
	{"/..;/x", false}, {"/..;a=b/x", false}, {"/.;/x", false}, {"/..%3bx/y", false}, {"/%2e%2e;x", false}, {"/a%2f..;b", false},
	{"/\\", false}, {"/a\\..\\b", false}, {"/%5c", false}, {"/a%5C..%5Cb", false},
	{"/\x00", false}, {"/%00", false}, {"/a\r\nb", false}, {"/%0d%0a", false}, {"/%0A", false}, {"/\t", false}, {"/%7f", false}, {"/\x7f", false}, {"/%1F", false},
	{"/%", false}, {"/%2", false}, {"/%zz", false}, {"/a%2", false},
	{"/..#/a", false}, {"/..%23", false}, {"/..%3fa", false}, {"/.#", false}, {"/a#..", true}, {"/a#b/c", true},
	{"/a b", false}, {"/ HTTP/1.1", false}, // a space ends the request target
}

func TestCheckPath(t *testing.T) {
	for _, tc := range pathCases {
		if err := checkPath(tc.path); (err == nil) != tc.ok {
			t.Errorf("checkPath(%q) = %v, want accepted %v", tc.path, err, tc.ok)
		}
	}
}

// confined tells whether path stays below base in every reading that a target
// may give it: as it is, with backslashes for slashes, without parameters.
func confined(base, p string) bool {
	within := func(p string) bool {
		p = path.Clean(p)
		return base == "" || p == base || strings.HasPrefix(p, base+"/")
	}
	// An empty base is the root, which Clean never leaves: only a dot segment shows there.
	climbs := func(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }
	decoded, err := url.PathUnescape(p)
	if err != nil {
		return false
	}
	slashed := strings.ReplaceAll(decoded, `\`, "/")
	var bare []string
	for segment := range strings.SplitSeq(slashed, "/") {
		if i := strings.IndexAny(segment, ";?#"); i >= 0 {
			segment = segment[:i]
		}
		bare = append(bare, segment)
	}
	for _, reading := range []string{p, decoded, slashed, strings.Join(bare, "/")} {
		if !within(base+reading) || climbs(reading) {
			return false
		}
	}
	return true
}

// FuzzCheckPath: what is accepted never leaves the prefix it is appended to,
// and fits into a request line.
func FuzzCheckPath(f *testing.F) {
	for _, tc := range pathCases {
		f.Add(tc.path)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if checkPath(p) != nil {
			return
		}
		for _, base := range []string{"", "/base", "/a/b"} {
			if !confined(base, p) {
				t.Fatalf("%q leaves %q", p, base)
			}
		}
		if strings.ContainsAny(p, " \t\r\n") {
			t.Fatalf("%q breaks a request line", p)
		}
	})
}

// TestParseTarget: one reading, byte for byte, of the two forms that are
// requests to us; everything else is an error.
func TestParseTarget(t *testing.T) {
	for _, tc := range []struct{ target, path, query, kind, channel, tail string }{
		{"/", "/", "", "", "", ""},
		{"/a", "/a", "", "a", "", ""},
		{"/a?", "/a", "?", "a", "", ""},
		{"/a?b?c", "/a", "?b?c", "a", "", ""},
		{"/?/webhooks/ci", "/", "?/webhooks/ci", "", "", ""},
		{"/webhooks", "/webhooks", "", "webhooks", "", ""},
		{"/webhooks/", "/webhooks/", "", "webhooks", "", ""},
		{"/webhooks/ci", "/webhooks/ci", "", "webhooks", "ci", ""},
		{"/webhooks/ci/", "/webhooks/ci/", "", "webhooks", "ci", "/"},
		{"/webhooks/ci?/x", "/webhooks/ci", "?/x", "webhooks", "ci", ""},
		{"/webhooks/ci//a%2Fb?c/d", "/webhooks/ci//a%2Fb", "?c/d", "webhooks", "ci", "//a%2Fb"},
		{"/webhooks//ci", "/webhooks//ci", "", "webhooks", "", "/ci"},
		{"//a//?//", "//a//", "?//", "", "a", "//"},
		{"//webhooks/ci", "//webhooks/ci", "", "", "webhooks", "/ci"},
		{"/webhooks%2Fci/x", "/webhooks%2Fci/x", "", "webhooks%2Fci", "x", ""},
		{"/webhooks/c%69/x", "/webhooks/c%69/x", "", "webhooks", "c%69", "/x"},
		{"/webhooks/ci#/x", "/webhooks/ci#/x", "", "webhooks", "ci#", "/x"},
		{"/a?u=http://h/x", "/a", "?u=http://h/x", "a", "", ""},
		{"/http://h/x", "/http://h/x", "", "http:", "", "/h/x"},
		{"http://h/x?y", "/x", "?y", "x", "", ""},
		{"HTTPS://user@h:1/webhooks/x%2Fy?", "/webhooks/x%2Fy", "?", "webhooks", "x%2Fy", ""},
		{"http://h//x", "//x", "", "", "x", ""},
		{"http://[::1]:80/webhooks/ci/x?y", "/webhooks/ci/x", "?y", "webhooks", "ci", "/x"},
		{"http://h/a://b/c", "/a://b/c", "", "a:", "", "/b/c"},
	} {
		got, err := parseTarget(tc.target)
		if want := (requestTarget{tc.path, tc.query, tc.kind, tc.channel, tc.tail}); err != nil || got != want {
			t.Errorf("parseTarget(%q) = %+v, %v, want %+v", tc.target, got, err, want)
		}
	}
	for _, target := range []string{
		"", "*", "h", "h:443", "h/webhooks/ci", "webhooks/ci", "?/webhooks/ci", "#/webhooks/ci",
		"http://h", "http://h?x=/y", "http://h#/x", "http:///webhooks/ci", "http://?/webhooks/ci", "http://", "://h/webhooks/ci",
		"http:/webhooks/ci?://h/x", "http:webhooks/ci", "http:/webhooks/ci", "zz:/webhooks/ci?://h/x", "zz://h/webhooks/ci", "ftp://h/webhooks/ci",
		"file:///webhooks/ci", "ws://h/webhooks/ci", "evil/webhooks/ci/x://h/run", " http://h/webhooks/ci", "http ://h/webhooks/ci", "http%3a//h/webhooks/ci",
	} {
		if got, err := parseTarget(target); err == nil {
			t.Errorf("parseTarget(%q) = %+v", target, got)
		}
	}
}

func TestCharacters(t *testing.T) {
	const tokens = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" // RFC 9110 section 5.6.2
	const names = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"             // RFC 3986 section 2.3
	for c := range 256 {
		s := string([]byte{byte(c)})
		if got, want := token(s), strings.Contains(tokens, s); got != want {
			t.Errorf("token(%q) = %v", s, got)
		}
		if got, want := validName(s), strings.Contains(names, s) && s != "."; got != want {
			t.Errorf("validName(%q) = %v", s, got)
		}
		value := []Header{{"X", []string{"ok", "a" + s + "b"}}}
		if got, want := checkHeaders(value) == nil, c == '\t' || c >= ' ' && c != 0x7f; got != want {
			t.Errorf("checkHeaders with value byte %q accepts: %v", s, got)
		}
		name := []Header{{"X" + s, []string{"v"}}}
		if got, want := checkHeaders(name) == nil, strings.Contains(tokens, s); got != want {
			t.Errorf("checkHeaders with name byte %q accepts: %v", s, got)
		}
		if back, ok := latin1(string(rune(c))); !ok || back != s {
			t.Errorf("latin1(%q) = %q, %v", rune(c), back, ok)
		}
	}
	for s, want := range map[string]bool{"": false, strings.Repeat("a", 128): true, strings.Repeat("a", 129): false, "notReady": true, "@all": false} {
		if validName(s) != want {
			t.Errorf("validName(%q) is not %v", s, want)
		}
	}
	if token("") {
		t.Error("an empty token")
	}
	for _, s := range []string{"\u0100", "abc\u2028", "\U0001F600"} {
		if back, ok := latin1(s); ok {
			t.Errorf("latin1(%q) = %q", s, back)
		}
	}
}

// canary stands where a payload would: no error may quote it.
const canary = "CANARY"

// TestDecodeWebhookHostile: whatever a stream says, an event is either sound
// or refused, with a reason that quotes none of it.
func TestDecodeWebhookHostile(t *testing.T) {
	for _, tc := range []struct {
		name, data string
		ok         bool
	}{
		{"least", `{"originalUrl":"/webhooks/ci/x"}`, true},
		{"legacy", `{"headers":{"host":"127.0.0.1:3000","set-cookie":["s1","s2"],"content-length":"13"},"originalUrl":"/webhooks/ci/y?a=1","path":"/webhooks/x/y","query":{"a":"1"},"body":"{}","timestamp":1700000000000}`, true},
		{"absolute form", `{"originalUrl":"http://evil/webhooks/ci/x?y"}`, true},
		{"unknown members", `{"originalUrl":"/webhooks/ci/x","retry":1e99,"extra":{"a":[null]}}`, true},
		{"nulls", `{"id":null,"method":null,"originalUrl":"/webhooks/ci/x","headers":null,"body":null,"bodyBase64":null,"query":null,"timestamp":null,"respond":null,"timeout":null,"mode":null}`, true},
		{"framing of the first hop", `{"originalUrl":"/webhooks/ci/x","headers":{"transfer-encoding":"chunked","content-length":"99","connection":"close","upgrade":"h2c"}}`, true},

		{"nothing", ``, false},
		{"no object", `"CANARY"`, false},
		{"array", `["CANARY"]`, false},
		{"null", `null`, false},
		{"cut", `{"originalUrl":"/webhooks/ci/CANARY`, false},
		{"two values", `{"originalUrl":"/webhooks/ci/x"} {"a":"CANARY"}`, false},
		{"no JSON", `CANARY`, false},
		{"method is a number", `{"originalUrl":"/webhooks/ci/CANARY","method":5}`, false},
		{"headers is a list", `{"originalUrl":"/webhooks/ci/x","headers":["CANARY"]}`, false},
		{"header is a number", `{"originalUrl":"/webhooks/ci/x","headers":{"x":12345}}`, false},
		{"header is an object", `{"originalUrl":"/webhooks/ci/x","headers":{"x":{"CANARY":"CANARY"}}}`, false},
		{"header list holds a list", `{"originalUrl":"/webhooks/ci/x","headers":{"x":["a",["CANARY"]]}}`, false},
		{"body is an object", `{"originalUrl":"/webhooks/ci/x","body":{"CANARY":1}}`, false},
		{"broken base64", `{"originalUrl":"/webhooks/ci/x","bodyBase64":"CANARY!"}`, false},
		{"respond is a string", `{"originalUrl":"/webhooks/ci/x","respond":"CANARY"}`, false},
		{"timeout is no integer", `{"originalUrl":"/webhooks/ci/x","timeout":1e99}`, false},
		{"deep", strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000), false},

		{"no target", `{}`, false},
		{"empty target", `{"originalUrl":""}`, false},
		{"authority without path", `{"originalUrl":"http://CANARY"}`, false},
		{"authority with query", `{"originalUrl":"http://CANARY?/x"}`, false},
		{"userinfo", `{"originalUrl":"@CANARY/x"}`, false},
		{"host and port", `{"originalUrl":"CANARY:80"}`, false},
		{"asterisk", `{"originalUrl":"*"}`, false},
		{"relative", `{"originalUrl":"CANARY/x"}`, false},
		{"dot segments", `{"originalUrl":"/webhooks/ci/CANARY/../../x"}`, false},
		{"dot segments, escaped", `{"originalUrl":"/webhooks/ci/CANARY/%2e%2E/x"}`, false},
		{"dot segments behind an authority", `{"originalUrl":"http://evil/webhooks/ci/../CANARY"}`, false},
		{"dot segments with parameters", `{"originalUrl":"/webhooks/ci/CANARY/..;/x"}`, false},
		{"backslash", `{"originalUrl":"/webhooks/ci/CANARY\\..\\x"}`, false},
		{"NUL in the path", `{"originalUrl":"/webhooks/ci/CANARY\u0000"}`, false},
		{"NUL in the query", `{"originalUrl":"/webhooks/ci/x?CANARY\u0000"}`, false},
		{"CRLF in the path", `{"originalUrl":"/webhooks/ci/x HTTP/1.1\r\nCANARY: 1"}`, false},
		{"CRLF in the query", `{"originalUrl":"/webhooks/ci/x?y HTTP/1.1\r\nCANARY: 1"}`, false},
		{"space in the path", `{"originalUrl":"/webhooks/ci/x HTTP/1.1"}`, false},
		{"space in the query", `{"originalUrl":"/webhooks/ci/x?CANARY HTTP/1.1"}`, false},
		{"no bytes in the path", `{"originalUrl":"/webhooks/ci/CANARY\u0100"}`, false},
		{"a path that differs does not count", `{"path":"/x","originalUrl":"/webhooks/ci/../CANARY"}`, false},

		{"CRLF in the method", `{"originalUrl":"/webhooks/ci/x","method":"GET / HTTP/1.1\r\nA: b\r\n\r\n"}`, false},
		{"space in the method", `{"originalUrl":"/webhooks/ci/x","method":"GET /"}`, false},
		{"CRLF in a header", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\r\nb: c"}}`, false},
		{"LF in a header list", `{"originalUrl":"/webhooks/ci/x","headers":{"a":["ok","CANARY\n"]}}`, false},
		{"NUL in a header", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\u0000"}}`, false},
		{"a header above latin1", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\u2028"}}`, false},
		{"CRLF in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{"a: b\r\nc":"CANARY"}}`, false},
		{"space in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{"content-length ":"CANARY"}}`, false},
		{"colon in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{":path":"CANARY"}}`, false},
		{"empty header name", `{"originalUrl":"/webhooks/ci/x","headers":{"":"CANARY"}}`, false},

		{"id with a slash", `{"originalUrl":"/webhooks/ci/x","id":"CANARY/../x"}`, false},
		{"id with CRLF", `{"originalUrl":"/webhooks/ci/x","id":"CANARY\r\n"}`, false},
		{"id too long", `{"originalUrl":"/webhooks/ci/x","id":"CANARY` + strings.Repeat("x", 128) + `"}`, false},
		{"id is a number", `{"originalUrl":"/webhooks/ci/x","id":12345}`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, err := decodeWebhook("ci", []byte(tc.data))
			if (err == nil) != tc.ok {
				t.Fatalf("decoded %+v, %v, want accepted %v", w, err, tc.ok)
			}
			if err != nil && (strings.Contains(err.Error(), canary) || strings.Contains(err.Error(), "12345")) {
				t.Errorf("error quotes the event: %v", err)
			}
			if err == nil {
				if err := w.check(); err != nil {
					t.Errorf("accepted but unsound: %v", err)
				}
				for _, h := range w.Headers {
					if hopByHop[h.Name] {
						t.Errorf("%s crossed the relay", h.Name)
					}
				}
			}
		})
	}
}

// TestDecodeWebhookChannel: a client takes webhooks of its own channel alone,
// whatever a server sends; its path is /webhooks/{channel} or below, and nothing
// of what is refused is quoted.
func TestDecodeWebhookChannel(t *testing.T) {
	for target, ok := range map[string]bool{
		"/webhooks/ci": true, "/webhooks/ci/": true, "/webhooks/ci?x": true, "/webhooks/ci/x://h/y": true, "http://h/webhooks/ci/x": true, "HTTPS://h/webhooks/ci": true,
		"/": false, "/CANARY": false, "/admin/CANARY": false, "/webhooks": false, "/webhooks/": false, "/webhooks?/ci": false, "/webhooks//ci": false,
		"/webhooks/CANARY": false, "/webhooks/other/CANARY": false, "/webhooks/cii": false, "/webhooks/c": false, "/webhooks/CI": false, "/webhooks/ci.": false,
		"/webhooks/c%69/x": false, "/webhooks%2fci/x": false, "/%77ebhooks/ci/x": false, "/Webhooks/ci": false, "/webhooks/ci%2fx": false, "/webhooks/ci#x": false, "/webhooks/ci;x": false,
		"//webhooks/ci": false, "//h/webhooks/ci": false, "///webhooks/ci": false, "/x/webhooks/ci": false, "/subscribe/ci": false,
		"/webhooks/other/../ci/x": false, "/webhooks/ci/../other": false, "/webhooks/ci/..;/other": false, "/webhooks/./ci": false,
		"http:/webhooks/ci?://h/CANARY": false, "zz:/webhooks/ci?://h/CANARY": false, "evil/webhooks/ci/x://h/CANARY": false, "http:/webhooks/ci": false, "http:webhooks/ci": false,
		"http:///webhooks/ci": false, "http://h/webhooks/CANARY": false, "http://h/CANARY": false, "ftp://h/webhooks/ci": false, "webhooks/ci": false, "?/webhooks/ci": false, "": false, "*": false,
	} {
		data := append(appendLatin1([]byte(`{"originalUrl":`), target), '}')
		w, err := decodeWebhook("ci", data)
		if (err == nil) != ok {
			t.Errorf("%q: decoded %+v, %v, want accepted %t", target, w, err, ok)
		}
		if err != nil && strings.Contains(err.Error(), canary) {
			t.Errorf("%q: error quotes the event: %v", target, err)
		}
	}
	for _, channel := range []string{"", ".", "..", "*", "c/i", "c%69"} { // no client is of such a channel
		data := append(appendLatin1([]byte(`{"originalUrl":`), "/webhooks/"+channel+"/x"), '}')
		if w, err := decodeWebhook(channel, data); err == nil {
			t.Errorf("channel %q: decoded %+v", channel, w)
		}
	}
}

// TestDecodeWebhookDefaults is what the absence of a member means, and how
// far the numbers of a stream are believed.
func TestDecodeWebhookDefaults(t *testing.T) {
	for _, tc := range []struct {
		data string
		want Webhook
	}{
		{`{"originalUrl":"/webhooks/ci/x?y"}`, Webhook{Method: "POST", Path: "/webhooks/ci/x", Query: "?y"}},
		{`{"originalUrl":"/webhooks/ci/x","path":"/other","query":{"q":"1"},"method":"get"}`, Webhook{Method: "get", Path: "/webhooks/ci/x"}},
		{`{"originalUrl":"/webhooks/ci/x","respond":true,"timeout":5000}`, Webhook{Method: "POST", Path: "/webhooks/ci/x", Timeout: 5 * time.Second}}, // nobody could be answered
		{`{"originalUrl":"/webhooks/ci/x","id":"a","respond":true,"timeout":5000,"mode":"status"}`, Webhook{ID: "a", Method: "POST", Path: "/webhooks/ci/x", Respond: true, Brief: true, Timeout: 5 * time.Second}},
		{`{"originalUrl":"/webhooks/ci/x","id":"a","respond":true,"timeout":9223372036854775807}`, Webhook{ID: "a", Method: "POST", Path: "/webhooks/ci/x", Respond: true, Timeout: maxResponseTimeout}},
		{`{"originalUrl":"/webhooks/ci/x","id":"a","respond":true,"timeout":-9223372036854775808}`, Webhook{ID: "a", Method: "POST", Path: "/webhooks/ci/x", Respond: true}},
		{`{"originalUrl":"/webhooks/ci/x","body":"text","bodyBase64":"/w=="}`, Webhook{Method: "POST", Path: "/webhooks/ci/x", Body: []byte("\xff")}},
		{`{"originalUrl":"/webhooks/ci/x","body":"[object Object]"}`, Webhook{Method: "POST", Path: "/webhooks/ci/x", Body: []byte("[object Object]")}},
		{`{"originalUrl":"/webhooks/ci/x","headers":{"X-a":"1","x-A":"2"}}`, Webhook{Method: "POST", Path: "/webhooks/ci/x", Headers: []Header{{"X-A", []string{"1", "2"}}}}},
	} {
		w, err := decodeWebhook("ci", []byte(tc.data))
		if err != nil {
			t.Errorf("%s: %v", tc.data, err)
			continue
		}
		for i := range w.Headers {
			slices.Sort(w.Headers[i].Values) // names that differ in case alone have no order
		}
		tc.want.Time = time.UnixMilli(0)
		sameWebhook(t, w, &tc.want)
	}
}

func TestAnswer(t *testing.T) {
	full := Answer{Status: 201, Headers: []Header{{"Content-Type", []string{"text/plain"}}, {"X-Dup", []string{"a", "b\xe9"}}}, Body: []byte("né\x00")}
	for _, tc := range []struct {
		name string
		a    Answer
		full bool
		json string
		want Answer
	}{
		{"full", full, true, `{"status":201,"headers":{"content-type":"text/plain","x-dup":["a","b` + "\u00e9" + `"]},"body":"né\u0000"}`, full},
		{"brief", full, false, `{"status":201}`, Answer{Status: 201}},
		{"binary", Answer{Status: 200, Body: []byte("\xff")}, true, `{"status":200,"headers":{},"bodyBase64":"/w=="}`, Answer{Status: 200, Body: []byte("\xff")}},
		{"control characters", Answer{Status: 200, Body: bytes.Repeat([]byte{0}, 18<<10)}, true, `{"status":200,"headers":{},"bodyBase64":"` + strings.Repeat("AAAA", 6<<10) + `"}`, Answer{Status: 200, Body: make([]byte, 18<<10)}},
		{"unreachable", Answer{Err: answerUnreachable}, true, `{"error":"unreachable"}`, Answer{Err: answerUnreachable}},
		{"timeout", Answer{Err: answerTimeout}, false, `{"error":"timeout"}`, Answer{Err: answerTimeout}},
		{"cookies and hops stay behind", Answer{Status: 200, Headers: []Header{{"Set-Cookie", []string{"a"}}, {"Connection", []string{"x-a"}}, {"X-A", []string{"1"}}, {"X-Relay-Client", []string{"1"}}, {"X-B", []string{"2"}}}}, true,
			`{"status":200,"headers":{"set-cookie":["a"],"connection":"x-a","x-a":"1","x-relay-client":"1","x-b":"2"},"body":""}`, Answer{Status: 200, Headers: []Header{{"X-B", []string{"2"}}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := tc.a.encode(tc.full)
			if string(data) != tc.json {
				t.Errorf("encoded %s, want %s", data, tc.json)
			}
			got, err := decodeAnswer(data)
			if err != nil {
				t.Fatal(err)
			}
			same := got.Status == tc.want.Status && got.Err == tc.want.Err && bytes.Equal(got.Body, tc.want.Body)
			if !same || fmt.Sprint(got.Headers) != fmt.Sprint(tc.want.Headers) {
				t.Errorf("decoded %+v, want %+v", got, tc.want)
			}
		})
	}
	for _, bad := range []string{
		``, `null`, `[]`, `{}`, `{"status":"200"}`, `{"status":199}`, `{"status":600}`, `{"status":-200}`, `{"status":101}`, `{"error":"CANARY"}`, `{"status":200,"error":"CANARY"}`,
		`{"status":200,"headers":{"a":"CANARY\r\nb: c"}}`, `{"status":200,"headers":{"a b":"CANARY"}}`, `{"status":200,"headers":{"a":"CANARY\u0100"}}`, `{"status":200,"body":5}`, `{"status":200,"bodyBase64":"CANARY!"}`,
	} {
		if a, err := decodeAnswer([]byte(bad)); err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("decodeAnswer(%s) = %+v, %v", bad, a, err)
		}
	}
	// The best of several answers is the one nearest to success.
	order := []Answer{{Status: 204}, {Status: 302}, {Status: 404}, {Status: 503}, {Err: answerTimeout}, {Err: answerUnreachable}}
	for i := 1; i < len(order); i++ {
		if order[i-1].rank() >= order[i].rank() {
			t.Errorf("%+v does not beat %+v", order[i-1], order[i])
		}
	}
}

func TestIDs(t *testing.T) {
	for range 100 {
		replica := newReplica()
		a, b := newID(replica), newID(replica)
		if a == b || !validName(a) || replicaOf(a) != replica || replicaOf(b) != replica {
			t.Fatalf("ids %q and %q of %q", a, b, replica)
		}
	}
	// Nothing else is of any replica, above all of none with a name that means something else.
	good := newID(testReplica)
	for _, id := range []string{
		"", "-", "x", "all", "all-" + good, "all-" + good[14:], "@all-" + good[14:], testReplica, testReplica + "-", good[14:], good[:len(good)-1], good + "A",
		strings.ToLower(good), strings.Replace(good, "-", "_", 1), strings.Replace(good, "-", "A", 1), good[:20] + "-" + good[21:], good[:20] + "1" + good[21:],
		good[:20] + "8" + good[21:], good[:20] + "\x00" + good[21:], good[:20] + "/" + good[21:], "@" + good[1:], good[:12] + "--" + good[14:], "elsewhere-" + good,
	} {
		if replica := replicaOf(id); replica != "" {
			t.Errorf("replicaOf(%q) = %q", id, replica)
		}
	}
}

// TestBackoff: growth to the cap, jitter within its half, and no overflow
// however long the other side is away.
func TestBackoff(t *testing.T) {
	plain := Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 3}
	for i, want := range []time.Duration{100, 300, 900, 1000, 1000} {
		if got := plain.Next(); got != want*time.Millisecond {
			t.Errorf("try %d: %v, want %v", i, got, want*time.Millisecond)
		}
	}
	plain.Reset()
	if got := plain.Next(); got != plain.Initial {
		t.Errorf("after Reset: %v", got)
	}
	for _, tc := range []Backoff{
		{Initial: time.Second, Max: 30 * time.Second, Factor: 2, Jitter: true},
		{Initial: time.Millisecond, Max: maxDuration, Factor: 100, Jitter: true},
		{Initial: time.Hour, Max: time.Hour, Factor: 1, Jitter: true},
		{Initial: time.Minute, Max: time.Second, Factor: 2, Jitter: true},
	} {
		grown := math.Min(float64(tc.Initial), float64(tc.Max))
		var low, high bool
		for range 5000 {
			share := float64(tc.Next()) / grown
			if share < 0.499 || share > 1.001 {
				t.Fatalf("%+v: %v of the delay", tc, share)
			}
			low, high = low || share < 0.6, high || share > 0.9
			grown = math.Min(grown*tc.Factor, float64(tc.Max))
		}
		if !low || !high {
			t.Errorf("%+v: jitter does not spread", tc)
		}
	}
}

// The hub.

var wide = Limits{Subscribers: 1000, PerAddress: 1000, Buffer: 1 << 20}

// joined is a subscriber that the hub took. Its Write only says that it was
// called; the test itself calls Take.
func joined(t testing.TB, h *Hub, channel string) *Subscriber {
	t.Helper()
	s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr("192.0.2.1"), Write: func() {}}
	if err := h.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// sized is an event whose frame has n bytes.
func sized(channel string, n int) *Event {
	return &Event{ID: strconv.Itoa(n), Channel: channel, frame: make([]byte, n)}
}

// took is the ids that Take hands out, until its queue is empty.
func took(s *Subscriber) (ids []string) {
	for batch := s.Take(nil); len(batch) > 0; batch = s.Take(batch) {
		for _, e := range batch {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// empty fails unless nothing at all is kept.
func empty(t testing.TB, h *Hub) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.channels) > 0 || len(h.addresses) > 0 || h.total != 0 {
		t.Errorf("hub keeps %d channels, %d addresses, counts %d subscribers", len(h.channels), len(h.addresses), h.total)
	}
}

func TestHubDelivers(t *testing.T) {
	h := &Hub{Limits: wide}
	if n, err := h.Publish(t.Context(), sized("a", 10)); n != 0 || err != nil {
		t.Errorf("publish to nobody: %d, %v", n, err)
	}
	empty(t, h)
	s1, s2, other := joined(t, h, "a"), joined(t, h, "a"), joined(t, h, "b")
	if !isClosed(s1.Live) {
		t.Error("a hub of its own is live at once")
	}
	for n := 1; n <= 5; n++ {
		if n, err := h.Publish(t.Context(), sized("a", n)); n != 1 || err != nil {
			t.Errorf("publish: %d, %v, want one replica", n, err)
		}
	}
	for _, s := range []*Subscriber{s1, s2} {
		if got := took(s); !slices.Equal(got, []string{"1", "2", "3", "4", "5"}) {
			t.Errorf("order %q", got)
		}
		if s.bytes != 0 || s.queue != nil {
			t.Errorf("%d bytes counted, queue %v, after all was taken", s.bytes, s.queue)
		}
	}
	if got := took(other); got != nil {
		t.Errorf("another channel got %q", got)
	}
	only := sized("a", 7)
	only.Only = s2.ID
	if _, n := h.Deliver(only); n != 1 || took(s1) != nil || len(took(s2)) != 1 {
		t.Error("an event for one subscriber went elsewhere")
	}
	if got := h.Delivered.Load(); got != 11 {
		t.Errorf("%d deliveries counted, want 11", got)
	}
	if !slices.Equal(slices.Sorted(slices.Values(h.Channels())), []string{"a", "b"}) || !h.Wants("a") || h.Wants("c") {
		t.Errorf("channels %q", h.Channels())
	}
	h.Leave(s1, errPeerGone)
	h.Leave(s1, errShutdown) // the writer and the reader of a stream both say so
	if reason := h.Reason(s1); reason != errPeerGone {
		t.Errorf("reason %v, want the first", reason)
	}
	if subscribers, channels := h.Count(); subscribers != 2 || channels != 2 {
		t.Errorf("%d subscribers of %d channels", subscribers, channels)
	}
	h.Leave(s2, errPeerGone)
	h.Leave(other, errPeerGone)
	empty(t, h)
	if _, n := h.Deliver(sized("a", 1)); n != 0 || took(s1) != nil {
		t.Error("delivered to who left")
	}
}

// TestHubTakenBy: only an event that asks for a response says to whom it
// went, with what its holder must know of them.
func TestHubTakenBy(t *testing.T) {
	var signals []Signal
	h := &Hub{Limits: wide, OnSignal: func(s Signal) { signals = append(signals, s) }}
	ours := &Subscriber{Channel: "a", Client: "c", Responds: true}
	legacy := &Subscriber{Channel: "a"}
	for _, s := range []*Subscriber{ours, legacy} {
		if err := h.Subscribe(s); err != nil {
			t.Fatal(err)
		}
	}
	h.Publish(t.Context(), sized("a", 1))
	if signals != nil {
		t.Fatalf("signals %+v for an event that asks for nothing", signals)
	}
	e := sized("a", 2)
	e.Respond = true
	h.Publish(t.Context(), e)
	if len(signals) != 1 || signals[0].Kind != signalTaken || signals[0].Event != "2" {
		t.Fatalf("signals %+v", signals)
	}
	var taken []Delivery
	if err := json.Unmarshal([]byte(signals[0].Data), &taken); err != nil {
		t.Error(err)
	}
	got := map[Delivery]bool{}
	for _, d := range taken {
		got[d] = true
	}
	if want := map[Delivery]bool{{ours.ID, "c", false}: true, {legacy.ID, "", true}: true}; !maps.Equal(got, want) {
		t.Errorf("deliveries %+v, want %+v", got, want)
	}
	e.Channel = "nobody's"
	if n, _ := h.Publish(t.Context(), e); n != 0 || len(signals) != 1 {
		t.Error("a signal for an event that nobody took")
	}
	if n, err := h.Signal(t.Context(), Signal{Kind: signalReady}); n != 1 || err != nil || len(signals) != 2 {
		t.Errorf("signal to itself: %d, %v", n, err)
	}
}

// TestHubBounds: bytes bound a queue, a batch that is being written counts
// until the next Take, and who is too slow is evicted and told why.
func TestHubBounds(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 9, PerAddress: 9, Buffer: 100}}
	slow, quick := joined(t, h, "a"), joined(t, h, "a")
	if _, n := h.Deliver(sized("a", 5000)); n != 2 {
		t.Fatal("an empty queue takes any one event")
	}
	quick.Take(nil)
	if quick.bytes != 5000 {
		t.Errorf("%d bytes counted while the batch is written", quick.bytes)
	}
	quick.Take(nil)
	if _, n := h.Deliver(sized("a", 60)); n != 1 {
		t.Fatalf("%d took the second event", n)
	}
	if reason := h.Reason(slow); reason != errSlow || !slow.Gone.Load() || h.Evicted.Load() != 1 || slow.queue != nil {
		t.Errorf("slow subscriber: %v, %d counted, queue %v", reason, h.Evicted.Load(), slow.queue)
	}
	if _, n := h.Deliver(sized("a", 40)); n != 1 || quick.bytes != 100 {
		t.Errorf("a queue may be full to the byte: %d, %d bytes", n, quick.bytes)
	}
	quick.Take(nil)
	if _, n := h.Deliver(sized("a", 1)); n != 0 || h.Reason(quick) != errSlow {
		t.Error("what is being written does not count")
	}
	empty(t, h)
	h.Leave(slow, errPeerGone)
	h.Leave(quick, errPeerGone)
	empty(t, h)
	beaten := joined(t, h, "a")
	for range 100 { // heartbeats are the relay's own, and nobody's backlog
		h.Push(beaten, heartbeatEvent)
	}
	if _, n := h.Deliver(sized("a", 5000)); n != 1 || len(took(beaten)) != 101 || beaten.bytes != 0 {
		t.Errorf("behind heartbeats an event was refused: %v, %d bytes", h.Reason(beaten), beaten.bytes)
	}
}

// TestHubTake: a batch ends at the burst, but never before its first event.
func TestHubTake(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 9, PerAddress: 9, Buffer: 1 << 30}}
	s := joined(t, h, "a")
	for _, n := range []int{burst + 1, burst / 2, burst / 2, 1, burst, 2} {
		h.Deliver(sized("a", n))
	}
	var batch []*Event
	var sizes [][]int
	total := s.bytes
	for batch = s.Take(batch); len(batch) > 0; batch = s.Take(batch) {
		var list []int
		for _, e := range batch {
			list = append(list, len(e.frame))
			total -= int64(len(e.frame))
		}
		sizes = append(sizes, list)
	}
	want := fmt.Sprint([][]int{{burst + 1}, {burst / 2, burst / 2}, {1}, {burst}, {2}})
	if fmt.Sprint(sizes) != want || total != 0 || s.bytes != 0 || s.batch != 0 {
		t.Errorf("batches %v, want %v; %d bytes over, %d and %d counted", sizes, want, total, s.bytes, s.batch)
	}
}

func TestHubLimits(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 3, PerAddress: 2, Buffer: 1}}
	try := func(addr, channel string) (*Subscriber, error) {
		s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr(addr), Write: func() {}}
		return s, h.Subscribe(s)
	}
	a1, _ := try("192.0.2.1", "a")
	a2, _ := try("192.0.2.1", "b")
	if _, err := try("192.0.2.1", "c"); err != errPerAddress {
		t.Errorf("third of one address: %v", err)
	}
	b, err := try("192.0.2.2", "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := try("192.0.2.3", "c"); err != errSubscribers {
		t.Errorf("one too many: %v", err)
	}
	if h.Wants("c") {
		t.Error("a channel is kept for a subscriber that was refused")
	}
	h.Leave(a1, errPeerGone)
	h.Leave(a1, errPeerGone) // must not make space twice
	a3, err := try("192.0.2.1", "c")
	if err != nil {
		t.Errorf("the place of who left: %v", err)
	}
	if _, err := try("192.0.2.1", "d"); err == nil {
		t.Error("leaving twice made space twice")
	}
	for _, s := range []*Subscriber{a2, a3, b} {
		h.Leave(s, errPeerGone)
	}
	empty(t, h)
	if err := new(Hub).Subscribe(&Subscriber{}); err == nil {
		t.Error("a hub without limits took a subscriber")
	}
}

// TestHubShares: one channel has at most half of all subscribers, so that who
// has its token does not keep out the others; in IPv6 a /64 is one address.
func TestHubShares(t *testing.T) {
	for _, tt := range []struct{ subscribers, share int }{{1, 1}, {2, 1}, {3, 2}, {50, 25}, {51, 26}} {
		h := &Hub{Limits: Limits{Subscribers: tt.subscribers, PerAddress: 1000, Buffer: 1}}
		var all []*Subscriber
		try := func(channel string, want error) {
			t.Helper()
			s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr("192.0.2.1"), Write: func() {}}
			if err := h.Subscribe(s); err != want {
				t.Fatalf("of %d, number %d of channel %s: %v, want %v", tt.subscribers, len(all)+1, channel, err, want)
			} else if err == nil {
				all = append(all, s)
			}
		}
		for range tt.share {
			try("a", nil)
		}
		if tt.subscribers > tt.share {
			try("a", errPerChannel)
			try("a", errPerChannel)
		}
		for range tt.subscribers - tt.share {
			try("b", nil)
		}
		try("b", errSubscribers)
		try("c", errSubscribers)
		if h.Wants("c") {
			t.Error("a channel is kept for a subscriber that was refused")
		}
		h.Leave(all[0], errPeerGone)
		try("a", nil)
		for _, s := range all {
			h.Leave(s, errPeerGone)
		}
		empty(t, h)
	}

	h := &Hub{Limits: Limits{Subscribers: 100, PerAddress: 2, Buffer: 1}}
	var all []*Subscriber
	for _, tt := range []struct {
		addr string
		want error
	}{
		{"2001:db8::1", nil}, {"2001:db8::2", nil}, {"2001:db8::3", errPerAddress}, {"2001:db8:0:0:ffff:ffff:ffff:ffff", errPerAddress}, {"2001:db8::1%eth0", errPerAddress},
		{"2001:db8:0:1::1", nil}, {"2001:db8:0:1::1", nil}, {"2001:db8:0:1::1", errPerAddress},
		{"192.0.2.1", nil}, {"::ffff:192.0.2.1", nil}, {"192.0.2.1", errPerAddress}, {"::ffff:192.0.2.1", errPerAddress}, {"192.0.2.2", nil},
	} {
		s := &Subscriber{Channel: "c" + tt.addr[:3], Addr: netip.MustParseAddr(tt.addr), Write: func() {}}
		if err := h.Subscribe(s); err != tt.want {
			t.Errorf("%s: %v, want %v", tt.addr, err, tt.want)
		} else if err == nil {
			all = append(all, s)
		}
	}
	for _, s := range all {
		h.Leave(s, errPeerGone)
	}
	empty(t, h)
}

// TestHubLive: behind a bus a subscriber is live once its channel is
// confirmed, and the bus hears of the first and the last subscriber.
func TestHubLive(t *testing.T) {
	var watched []string
	h := &Hub{Limits: wide, Watch: func(channel string) { watched = append(watched, channel) }}
	first := joined(t, h, "a")
	h.Confirm("b") // nobody's, or of a moment ago
	if isClosed(first.Live) {
		t.Fatal("live before the bus confirmed")
	}
	if _, n := h.Deliver(sized("a", 1)); n != 1 {
		t.Error("events queue from the beginning")
	}
	h.Confirm("a")
	h.Confirm("a")
	if !isClosed(first.Live) {
		t.Fatal("not live after the bus confirmed")
	}
	second := joined(t, h, "a")
	if !isClosed(second.Live) {
		t.Error("a channel that is live is live for all")
	}
	h.Suspend()
	third := joined(t, h, "a")
	if isClosed(third.Live) {
		t.Error("live while the bus is down")
	}
	if !isClosed(first.Live) {
		t.Error("an outage takes ready back")
	}
	h.Confirm("a")
	if !isClosed(third.Live) {
		t.Error("not live after the outage")
	}
	if !slices.Equal(watched, []string{"a"}) {
		t.Errorf("watched %q, want the first subscriber alone", watched)
	}
	reason := errors.New("a reason of its own")
	h.Leave(second, reason)
	if h.Reason(second) != reason || h.Reason(first) != nil {
		t.Error("evicted the wrong one")
	}
	h.Leave(first, errPeerGone)
	h.Leave(third, errPeerGone)
	if !slices.Equal(watched, []string{"a", "a"}) {
		t.Errorf("watched %q, want the last subscriber too", watched)
	}
	empty(t, h)
	if fourth := joined(t, h, "a"); isClosed(fourth.Live) {
		t.Error("a channel that was given up counts as live")
	}
}

// TestHubWrites: whoever queues an event while nobody writes starts the
// writer, and only then; a stream ends at once, or with its queue.
func TestHubWrites(t *testing.T) {
	h := &Hub{Limits: wide}
	var writes, aborts atomic.Int32
	s := &Subscriber{Channel: "a", Write: func() { writes.Add(1) }}
	if err := h.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	h.Attach(s, func() { aborts.Add(1) })
	count := func(what string, want int32) {
		t.Helper()
		if s.Writers.Wait(); writes.Load() != want {
			t.Errorf("%s: %d writers, want %d", what, writes.Load(), want)
		}
	}
	h.Deliver(sized("a", 1))
	count("before the stream has begun", 0)
	took(s)
	h.Deliver(sized("a", 2))
	h.Deliver(sized("a", 3))
	count("two events", 1)
	h.Finish(s, errStreamAge)
	h.Deliver(sized("a", 4))
	if h.Reason(s) != nil || aborts.Load() != 0 {
		t.Errorf("ended with %v before its queue was written", h.Reason(s))
	}
	if got := took(s); !slices.Equal(got, []string{"2", "3", "4"}) || h.Reason(s) != errStreamAge || aborts.Load() != 1 {
		t.Errorf("took %q, then ended with %v, aborted %d times", got, h.Reason(s), aborts.Load())
	}
	if h.Push(s, heartbeatEvent) {
		t.Error("a heartbeat for a stream that has ended")
	}
	h.Leave(s, errShutdown)
	count("after the end", 1)
	empty(t, h)

	idle, busy, late := joined(t, h, "a"), joined(t, h, "a"), joined(t, h, "a")
	took(idle)
	if got := len(h.Subscribers()); got != 3 {
		t.Errorf("%d subscribers listed", got)
	}
	for _, s := range h.Subscribers() {
		h.Finish(s, errShutdown)
	}
	if h.Reason(idle) != errShutdown || h.Reason(busy) != nil {
		t.Errorf("idle stream: %v, one that is being written: %v", h.Reason(idle), h.Reason(busy))
	}
	if !h.Push(busy, heartbeatEvent) || len(busy.Take(nil)) != 1 || len(busy.Take(nil)) != 0 || h.Reason(busy) != errShutdown {
		t.Errorf("a stream that finishes: %v", h.Reason(busy))
	}
	h.Leave(late, errPeerGone)
	h.Attach(late, func() { aborts.Add(1) })
	if aborts.Load() != 2 {
		t.Error("a connection was given to a stream that had ended, and stays")
	}
	empty(t, h)
}

// TestHubCheck: a probe must tell a stuck hub from a busy one, and not hang with it.
func TestHubCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &Hub{}
		check := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), checkTimeout)
			defer cancel()
			return h.Check(ctx)
		}
		h.mu.Lock()
		time.AfterFunc(time.Second, h.mu.Unlock)
		if err := check(); err != nil {
			t.Errorf("busy hub: %v", err)
		}
		h.mu.Lock()
		began := time.Now()
		if err := check(); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > checkTimeout+time.Second {
			t.Errorf("stuck hub: %v after %v", err, time.Since(began))
		}
		h.mu.Unlock()
		if err := check(); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}

// TestEventsKeepWhatTheyCount makes large events give their memory back and
// small ones be kept: budgets count the bytes that are used.
func TestEventsKeepWhatTheyCount(t *testing.T) {
	large, small := strings.Repeat("a", 40<<10), []byte("{}")
	for _, respond := range []bool{false, true} {
		var kept []*Event
		counted := 0
		for range 1000 {
			eventOf("a", &Webhook{ID: "x", Method: "POST", Path: "/", Body: []byte(large)}).release()
			e := eventOf("b", &Webhook{ID: "x", Method: "POST", Path: "/", Body: small, Respond: respond})
			kept = append(kept, e)
			counted += len(e.wire)
		}
		used := 0
		for _, e := range kept {
			used += cap(e.wire)
		}
		if used > 8*counted { // mostly space for the head of an event
			t.Errorf("respond %v: %d bytes are used, %d counted", respond, used, counted)
		}
	}
}

// TestHubHammer lets everything happen at once. Each channel has one
// publisher, so its subscribers must see its numbers without a gap, from the
// first they see to their end.
func TestHubHammer(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 50, PerAddress: 40, Buffer: 4000}, Watch: func(string) {}}
	channels := []string{"a", "b", "c"}
	publishing := make(chan struct{})
	var revoked, slow atomic.Int64
	var publishers, others sync.WaitGroup
	deadline := time.Now().Add(patience)
	for _, channel := range channels {
		publishers.Go(func() {
			for n := 0; n < 3000 || (revoked.Load() == 0 || slow.Load() == 0) && time.Now().Before(deadline); n++ {
				h.Deliver(&Event{ID: strconv.Itoa(n), Channel: channel, frame: make([]byte, 1+mathrand.N(200))})
			}
		})
		others.Go(func() {
			for !isClosed(publishing) {
				h.Confirm(channel)
				if mathrand.N(10) == 0 {
					h.Suspend()
				}
				for _, s := range h.Subscribers() {
					if mathrand.N(100) == 0 {
						h.Leave(s, errRevoked)
					}
				}
				time.Sleep(100 * time.Microsecond)
			}
		})
	}
	subscribe := func(addr netip.Addr) {
		for !isClosed(publishing) {
			s := &Subscriber{Channel: channels[mathrand.N(len(channels))], Addr: addr}
			last, under := -1, atomic.Int32{}
			s.Write = func() {
				for batch := s.Take(nil); len(batch) > 0; batch = s.Take(batch) {
					if under.Add(1) > 1 {
						t.Error("two writers at once")
					}
					for _, e := range batch {
						n, _ := strconv.Atoi(e.ID)
						if last >= 0 && n != last+1 {
							t.Errorf("%d came after %d", n, last)
						}
						last = n
					}
					if mathrand.N(50) == 0 {
						time.Sleep(time.Millisecond) // a slow network
					}
					under.Add(-1)
				}
			}
			if h.Subscribe(s) != nil {
				runtime.Gosched()
				continue // the limits are meant to be met
			}
			gone := make(chan struct{})
			h.Attach(s, func() { close(gone) })
			s.Write()
			select {
			case <-gone:
			case <-time.After(time.Duration(mathrand.N(20)) * time.Millisecond):
			}
			switch mathrand.N(3) {
			case 0:
				h.Finish(s, errStreamAge)
				<-gone
			default:
				h.Leave(s, errPeerGone)
			}
			s.Writers.Wait()
			switch h.Reason(s) {
			case errRevoked:
				revoked.Add(1)
			case errSlow:
				slow.Add(1)
			}
		}
	}
	for i := range 60 {
		others.Go(func() { subscribe(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 2)})) })
	}
	publishers.Wait()
	h.mu.Lock()
	count := 0
	for _, c := range h.channels {
		count += len(c.subscribers)
		for s := range c.subscribers {
			queued := s.batch
			for _, e := range s.queue {
				queued += int64(len(e.frame))
			}
			if queued != s.bytes || s.bytes > h.Limits.Buffer || s.reason != nil {
				t.Errorf("subscriber counts %d bytes and has %d; %v", s.bytes, queued, s.reason)
			}
		}
	}
	if count != h.total {
		t.Errorf("hub counts %d subscribers and has %d", h.total, count)
	}
	h.mu.Unlock()
	close(publishing)
	others.Wait()
	empty(t, h)
	if revoked.Load() == 0 || slow.Load() == 0 {
		t.Errorf("%d revoked, %d slow: the hammer is too soft", revoked.Load(), slow.Load())
	}
}

// Benchmarks.

// pushHook is a GitHub push of 10 KiB as it was captured.
func pushHook() *Webhook {
	return &Webhook{
		ID: newID(testReplica), Method: "POST", Path: "/webhooks/github/push", Query: "?x=1", Body: githubBody(10 << 10), Time: wireTime,
		Headers: endToEnd(headersOf("Accept: */*\nContent-Type: application/json\nUser-Agent: GitHub-Hookshot/044aadd\nX-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-4c9367dc0958\nX-GitHub-Event: push\nX-GitHub-Hook-ID: 292430182\nX-Hub-Signature-256: sha256=d57c68ca6f92289e6987922ff26938930f6e66a2d161ef06abdf1859230aa23c")),
	}
}

// plainHook is a webhook as a program without our encoder would write it.
type plainHook struct {
	ID          string            `json:"id"`
	Method      string            `json:"method"`
	OriginalURL string            `json:"originalUrl"`
	Path        string            `json:"path"`
	Query       map[string]string `json:"query"`
	Headers     map[string]string `json:"headers"`
	Body        string            `json:"body"`
	Timestamp   int64             `json:"timestamp"`
}

// times is n calls of f.
func times(n int, f func()) func() {
	return func() {
		for range n {
			f()
		}
	}
}

// BenchmarkEncode: the one encoding of an event, beside encoding/json.
func BenchmarkEncode(b *testing.B) {
	w := pushHook()
	plain := plainHook{
		ID: w.ID, Method: w.Method, OriginalURL: w.Path + w.Query, Path: w.Path, Query: map[string]string{"x": "1"},
		Headers: map[string]string{"content-length": strconv.Itoa(len(w.Body))}, Body: string(w.Body), Timestamp: w.Time.UnixMilli(),
	}
	for _, h := range w.Headers {
		plain.Headers[strings.ToLower(h.Name)] = h.Values[0]
	}
	duel(b, "event", 200, times(200, func() { eventOf("github", w) }), times(200, func() { json.Marshal(plain) }))
}

// BenchmarkDecode: one event as the client reads it, beside encoding/json
// alone, without the checks.
func BenchmarkDecode(b *testing.B) {
	data := onlyMessage(b, eventOf("github", pushHook()).frame).data
	duel(b, "event", 100, times(100, func() {
		if _, err := decodeWebhook("github", data); err != nil {
			b.Fatal(err)
		}
	}), times(100, func() {
		var plain plainHook
		json.Unmarshal(data, &plain)
	}))
}

// BenchmarkHubPublish: one event to 1 and to 500 subscribers, who take it,
// beside a send to as many Go channels.
func BenchmarkHubPublish(b *testing.B) {
	for _, n := range []int{1, 500} {
		b.Run(fmt.Sprintf("subscribers=%d", n), func(b *testing.B) {
			h := &Hub{Limits: wide}
			subscribers := make([]*Subscriber, n)
			queues := make([]chan *Event, n)
			for i := range n {
				subscribers[i], queues[i] = joined(b, h, "a"), make(chan *Event, 1)
			}
			e := sized("a", 1024)
			var batch []*Event
			duel(b, "event", 100, times(100, func() {
				h.Publish(context.Background(), e)
				for _, s := range subscribers {
					batch = s.Take(batch)
				}
			}), times(100, func() {
				for _, q := range queues {
					q <- e
				}
				for _, q := range queues {
					<-q
				}
			}))
		})
	}
}
