// Streams an answer over gRPC:  go run . [HOST:PORT] [QUESTION]
// Generate the stubs with ./generate.sh or `buf generate ../../protos`; docs/clients.md says what that needs.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"

	chat "example.com/chat/trivium/chat/v1"
	sampling "example.com/chat/trivium/sampling/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

func main() {
	defaults := []string{"127.0.0.1:50051", "What is the capital of France?"}
	arguments := append(os.Args[1:], defaults[len(os.Args)-1:]...)
	connection, err := grpc.Dial(arguments[0], grpc.WithInsecure())
	check(err)
	models, err := chat.NewModelServiceClient(connection).ListModels(context.Background(), &chat.ListModelsRequest{})
	check(err)
	question := &chat.ContentPart{Part: &chat.ContentPart_Text{Text: arguments[1]}}
	stream, err := chat.NewChatServiceClient(connection).StreamChatCompletion(context.Background(), &chat.CreateChatCompletionRequest{
		Model:    models.Models[0].Id,
		Messages: []*chat.ChatMessage{{Role: chat.Role_ROLE_USER, Content: []*chat.ContentPart{question}}},
		Options: &chat.CompletionOptions{
			Sampling:            &sampling.SamplingParams{Temperature: proto.Float64(0)},
			MaxCompletionTokens: proto.Int32(100)}})
	check(err)
	event, err := stream.Recv()
	for ; err == nil; event, err = stream.Recv() {
		fmt.Print(event.GetDelta().GetContent())
		if usage := event.GetUsage(); usage != nil {
			tokens := fmt.Sprintf("%d + %d tokens", usage.PromptTokens, usage.CompletionTokens)
			fmt.Printf("\n[%s, %.3f gpu_seconds]\n", tokens, float64(usage.DeviceNanoseconds)/1e9)
		}
	}
	if err != io.EOF {
		log.Fatal(err)
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
